"""Real builds in containers, as root with build users."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError
from twisted.internet.task import deferLater

from guixd.build.logs import log_file
from guixd.errors import BuildError
from guixd.formats.hashes import to_base32
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from tests.build.graph import FIRST_UID, GID, Recorder, TestCase, World, processes, reactor
from tests.support import requires_root


class Real(TestCase):
    """A world whose builders are real."""

    timeout = 60

    def setUp(self) -> None:
        self.world = World(self)

    async def succeed(self, *drvs: StorePath, **options: Any) -> Recorder:
        """Build DRVS; return what was told."""
        observer = Recorder()
        try:
            await self.world.build(*drvs, observer=observer, **options)
        except BuildError as error:
            raise AssertionError(f"{error}: {observer.events}") from error
        return observer

    async def fail_with(self, status: int, drv: StorePath, **options: Any) -> Recorder:
        """Build DRV, which must fail with STATUS and leave nothing; return what was told."""
        observer = Recorder()
        try:
            await self.world.build(drv, observer=observer, **options)
        except BuildError as error:
            self.assertEqual((error.status, observer.events and status), (status, status))
            self.error = error
        else:
            self.fail(f"built: {observer.events}")
        self.assertFalse(self.world.is_valid(drv))
        if not options.get("keep_failed"):
            self.assertEqual(self.world.leftovers(), [])
        return observer


@requires_root
class OutcomeTests(Real):
    """How builds end, and with which status."""

    async def test_success(self) -> None:
        """B7, B35, D15: output, registration, lock file gone, nothing left behind."""
        world = self.world
        drv = world.derive("hello", 'echo "$0" "$name" > $out', environment={"x": "y"})
        await self.succeed(drv)
        path = world.output(drv)
        self.assertEqual(Path(path).read_text(), "sh hello\n")
        info = world.store.database.path_info(path)
        nar = nar_of_file(b"sh hello\n")
        self.assertEqual((info.nar_hash, info.nar_size), (hashlib.sha256(nar).digest(), len(nar)))
        self.assertEqual((info.deriver, info.references), (drv, ()))
        self.assertFalse(os.path.lexists(path + ".lock"))
        self.assertEqual(world.leftovers(), [])

    async def test_much(self) -> None:
        """B7, B35: so do large outputs and whatever else a builder leaves."""
        world = self.world
        script = (
            "mkdir $out; for i in NUMBERS; do echo $i > $out/$i; echo > /tmp/$i; echo > $i; done;"
            " dd if=/dev/zero of=/tmp/large bs=1048576 count=4"
        )
        drv = world.derive("much", script.replace("NUMBERS", " ".join(map(str, range(300)))))
        await self.succeed(drv)
        self.assertEqual(len(os.listdir(world.output(drv))), 300)
        self.assertEqual(world.leftovers(), [])

    async def test_exit_codes(self) -> None:
        """B2, D26: exit code 100, signal 100, missing output 1; the lock file stays."""
        world = self.world
        drv = world.derive("code", "exit 3")
        observer = await self.fail_with(100, drv)
        self.assertIn("failed with exit code 3", observer.logs[-1])
        self.assertEqual(Path(world.output(drv) + ".lock").stat().st_size, 0)
        signalled = world.derive("signal", "sh -c 'kill -9 $$' & wait; exec sh -c 'exit 137'")
        self.assertIn("exit code 137", (await self.fail_with(100, signalled)).logs[-1])
        observer = await self.fail_with(1, world.derive("missing", "true"))
        self.assertIn("failed to produce output path", observer.logs[-1])
        self.assertIn(" - 1 builder for `", observer.traces[-1])

    async def test_fixed_builder_fails(self) -> None:
        """B2, D26: a failing fixed-output builder is a transient failure, status 1."""
        fixed = ("sha256", "0" * 64)
        await self.fail_with(1, self.world.derive("fixed", "exit 1", fixed=fixed))

    async def test_bad_builders(self) -> None:
        """B31, D14: a builder outside of the store, missing, or no program: 100."""
        world = self.world
        text = world.text("text", "no program")
        for name, builder, sources in (
            ("outside", "/proc/self/exe", ()),
            ("missing", f"{world.shell}/bin/nope", (world.shell,)),
            ("text", text, (text,)),
        ):
            await self.fail_with(100, world.derive(name, builder=builder, sources=sources))

    async def test_environment(self) -> None:
        """B17, D9: the environment is exactly what the specification says."""
        world = self.world
        drv = world.derive(
            "env",
            "env > $out",
            environment={"HOME": "/own", "NIX_BUILD_CORES": "9", "PWD": "/x", "TMPDIR": "/y"},
        )
        await self.succeed(drv, cores=3)
        top = "/tmp/guix-build-env.drv-0"
        expected = {
            "NIX_STORE": world.store.directory.path,
            "HOME": "/own",
            "NIX_BUILD_CORES": "9",
            "PATH": f"{world.shell}/bin",
            "name": "env",
            "out": world.output(drv),
            **dict.fromkeys(("NIX_BUILD_TOP", "TMPDIR", "TEMPDIR", "TMP", "TEMP", "PWD"), top),
        }
        lines = Path(world.output(drv)).read_text().splitlines()
        variables = dict(line.split("=", 1) for line in lines)
        # The shell adds these to what it was given.
        for own in "SHLVL", "OLDPWD", "_":
            variables.pop(own, None)
        self.assertEqual(variables, expected)

    async def test_timeouts(self) -> None:
        """B11: silence and time: 101, a trace, and the process is gone."""
        world = self.world
        for options in {"max_silent_time": 1}, {"timeout": 1}:
            drv = world.derive("slow" + next(iter(options)), "sleep 1000")
            observer = await self.fail_with(101, drv, **options)
            self.assertEqual(observer.traces[-1], f"@ build-failed {drv} - timeout")
            self.assertEqual(processes(), [])

    async def test_log_limit(self) -> None:
        """B13: a log that is too long gives 101."""
        await self.fail_with(101, self.world.derive("chatty", "yes"), max_log_size=100_000)

    async def test_early_end_of_output(self) -> None:
        """B38: a builder that closes its output is waited for, with limits."""
        world = self.world
        drv = world.derive("mute", "exec >/dev/null 2>&1; sleep 0.2; touch $out")
        await self.succeed(drv)
        drv = world.derive("mute2", "exec >/dev/null 2>&1; sleep 1000")
        await self.fail_with(101, drv, timeout=1)

    async def test_background_process(self) -> None:
        """X21, X24: what a build leaves running is dead when it ends, and delays nothing."""
        world = self.world
        drv = world.derive(
            "fork", "sleep 1000 & sleep 1001 </dev/null >/dev/null 2>&1 & touch $out"
        )
        await self.succeed(drv)
        self.assertEqual(processes(), [])

    async def test_cancel(self) -> None:
        """X34, B8: giving up kills the builder and removes all of it."""
        world, observer = self.world, Recorder()
        building = world.build(world.derive("long", "echo on; sleep 1000"), observer=observer)
        await observer.seen("on\n")
        building.cancel()
        with self.assertRaises(CancelledError):
            await building
        await world.engine.stop()
        self.assertEqual((processes(), world.leftovers()), ([], []))

    async def test_cancel_at_any_time(self) -> None:
        """X34, B8: whenever clients leave, nothing is left, and the next build works."""
        world = self.world
        rounds = 12
        for number in range(rounds):
            drvs = [world.derive(f"c{number}-{i}", "echo x > $out; sleep 0.01") for i in range(3)]
            building = world.build(*drvs, max_jobs=3)
            await deferLater(reactor, 0.004 * number, lambda: None)
            building.cancel()
            try:
                await building
            except CancelledError:
                pass
            again = world.build(drvs[0])
            if number % 2:
                await again
                self.assertTrue(world.is_valid(drvs[0]))
            else:
                again.cancel()
                again.addErrback(lambda failure: failure.trap(CancelledError) and None)
        await world.engine.stop()
        self.assertEqual((processes(), world.leftovers()), ([], []))
        self.assertEqual(world.engine._scheduler.running, 0)
        self.assertEqual(world.engine._claims._waiting, {})

    async def test_leftover_process_of_the_user(self) -> None:
        """X22: processes of the build user are killed before its next build."""
        uids = f"os.setgid({GID}); os.setuid({FIRST_UID})"
        script = f"import os, time; {uids}; print('on', flush=True); time.sleep(1000)"
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            await self.succeed(self.world.derive("a"))
            self.assertEqual(process.wait(), -9)

    async def test_two_users(self) -> None:
        """X20: builds at the same time have different users; more builds than users queue."""
        world = self.world
        drvs = [world.derive(f"u{i}", "id -u > $out; sleep 0.05") for i in range(5)]
        await self.succeed(*drvs, max_jobs=5)
        uids = [Path(world.output(drv)).read_text() for drv in drvs]
        self.assertEqual(set(uids), {f"{FIRST_UID}\n", f"{FIRST_UID + 1}\n"})

    async def test_stale_output(self) -> None:
        """B34: what lies at the name of an output, but is not valid, is removed first."""
        world = self.world
        drv = world.derive("a")
        os.makedirs(world.output(drv) + "/x/y")
        await self.succeed(drv)
        self.assertTrue(Path(world.output(drv)).is_file())

    async def test_foreign_lock(self) -> None:
        """B35: a build waits, without a slot, for who has the output's lock, and says so."""
        world = self.world
        drv, other = world.derive("a"), world.derive("other")
        script = (
            "import fcntl, sys; file = open(sys.argv[1], 'a+');"
            "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script, world.output(drv) + ".lock"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as holder:
            assert holder.stdin is not None and holder.stdout is not None
            holder.stdout.readline()
            observer = Recorder()
            building = world.build(drv, other, observer=observer, max_jobs=1)
            await observer.seen(f"@ build-succeeded {other}")
            told = f"waiting for locks on the outputs of `{drv}'"
            self.assertEqual(observer.logs.count(told), 1)
            self.assertFalse(building.called)
            holder.stdin.close()
            holder.wait()
        await building
        self.assertTrue(world.is_valid(drv))

    async def test_keep_failed(self) -> None:
        """X23: a failed tree is kept for its owner, without special permissions."""
        world = self.world
        drv = world.derive("kept", "echo x > file; chmod 4777 file; exit 1")
        observer = await self.fail_with(
            100, drv, keep_failed=True, client_uid=64900, client_gid=64901
        )
        (name,) = world.leftovers()
        tree = Path(world.settings.directories.temporary, name)
        self.assertTrue(any(str(tree) in line for line in observer.logs))
        status = (tree / "file").stat()
        self.assertEqual((status.st_uid, status.st_gid), (64900, 64901))
        self.assertFalse(status.st_mode & (stat.S_ISUID | stat.S_IWOTH))

    async def test_one_client_leaves_others_not(self) -> None:
        """B7, B8: two clients of one real build; one leaves, the other gets all."""
        world, first, second = self.world, Recorder(), Recorder()
        drv = world.derive("a", "echo one; sleep 0.3; echo two; touch $out")
        one = world.build(drv, observer=first)
        await first.seen("one\n")
        two = world.build(drv, observer=second)
        one.cancel()
        with self.assertRaises(CancelledError):
            await one
        await two
        self.assertEqual(second.text, "one\ntwo\n")
        self.assertTrue(second.traces[0].startswith("@ build-started"))


@requires_root
class OutputTests(Real):
    """What outputs must be, and what becomes of them."""

    async def test_rejected(self) -> None:
        """B20: group-writable, FIFO."""
        world = self.world
        observer = await self.fail_with(1, world.derive("w", "touch $out; chmod 664 $out"))
        self.assertIn("suspicious ownership or permission", observer.logs[-1])
        self.assertIn("build-failed", observer.traces[-1])
        observer = await self.fail_with(1, world.derive("p", "mkdir $out; mkfifo $out/p"))
        self.assertIn("unsupported type", self.error.text)
        self.assertFalse([t for t in observer.traces if "build-failed" in t])

    async def test_metadata(self) -> None:
        """B21: modes, times and owner become those of the store; hard links stay."""
        world = self.world
        drv = world.derive(
            "modes",
            "mkdir -p $out/d; echo a > $out/d/x; chmod 4711 $out/d/x; echo b > $out/y;"
            "ln $out/y $out/z; chmod 600 $out/y; ln -s y $out/l; chmod 1700 $out/d",
        )
        await self.succeed(drv)
        out = Path(world.output(drv))
        modes = {
            str(p.relative_to(out)): stat.S_IMODE(p.lstat().st_mode) for p in out.rglob("[dxyz]")
        }
        self.assertEqual(modes, {"d": 0o555, "d/x": 0o555, "y": 0o444, "z": 0o444})
        for path in (out, *out.rglob("*")):
            status = path.lstat()
            self.assertEqual((status.st_uid, status.st_mtime), (0, 1), path)
        self.assertEqual((out / "y").stat().st_ino, (out / "z").stat().st_ino)

    async def test_references(self) -> None:
        """B24, D17, D18: in contents, names and links; of itself; not compressed."""
        world = self.world
        a, b, c, d = (world.derive(n) for n in "abcd")
        drv = world.derive(
            "refs",
            "mkdir $out; echo $out > $out/self; ln -s $a/x $out/link; touch $out/${b##*/};"
            "echo $c | gzip > $out/c.gz; echo $d | tr a-z A-Z > $out/d",
            inputs=[a, b, c, d],
            environment={n: world.output(p) for n, p in zip("abcd", (a, b, c, d), strict=True)},
        )
        await self.succeed(drv, max_jobs=2)
        info = world.store.database.path_info(world.output(drv))
        expected = sorted([world.output(drv), world.output(a), world.output(b)])
        self.assertEqual(list(info.references), expected)

    async def test_several_outputs(self) -> None:
        """B27, D19: outputs that refer to each other one way are registered together."""
        world = self.world
        drv = world.derive("two", "echo $lib > $out; echo > $lib", outputs=("out", "lib"))
        await self.succeed(drv)
        for name in "out", "lib":
            info = world.store.database.path_info(world.output(drv, name))
            self.assertEqual(info.deriver, drv)
        self.assertEqual(
            world.store.database.path_info(world.output(drv)).references,
            (world.output(drv, "lib"),),
        )

    async def test_cycle(self) -> None:
        """B26: outputs that refer to each other are refused; nothing is registered or left."""
        world = self.world
        drv = world.derive("cycle", "echo $lib > $out; echo $out > $lib", outputs=("out", "lib"))
        observer = await self.fail_with(1, drv)
        self.assertIn("cycle", observer.logs[-1])
        self.assertIn("build-failed", observer.traces[-1])
        for name in "out", "lib":
            self.assertFalse(world.is_valid(drv, name))
            self.assertFalse(os.path.lexists(world.output(drv, name)))

    async def test_all_or_none(self) -> None:
        """B27: if one output is wrong, none gets its name."""
        world = self.world
        drv = world.derive("half", "echo > $lib; mkfifo $out", outputs=("out", "lib"))
        await self.fail_with(1, drv)
        self.assertFalse(os.path.lexists(world.output(drv, "lib")))

    async def test_salvage(self) -> None:
        """B39: outputs of a failed build are left in the store, harmless, not registered."""
        world = self.world
        drv = world.derive(
            "failed", "mkdir $out; touch $out/x; chmod 6777 $out/x; chmod 777 $out; exit 1"
        )
        await self.fail_with(100, drv)
        out = Path(world.output(drv))
        self.assertEqual(stat.S_IMODE((out / "x").stat().st_mode), 0o775)
        self.assertEqual(stat.S_IMODE(out.stat().st_mode) & 0o002, 0)
        self.assertFalse(world.is_valid(drv))
        special = world.derive("special", "mkdir $out; mkfifo $out/x; exit 1")
        await self.fail_with(100, special)
        self.assertFalse(os.path.lexists(world.output(special)))

    async def test_fixed(self) -> None:
        """B23: fixed outputs, flat and recursive, by several algorithms."""
        world = self.world
        nar = nar_of_file(b"x\n")
        drvs = []
        for algorithm in "md5", "sha1", "sha256", "sha512":
            for mode, data in ("", b"x\n"), ("r:", nar):
                name = f"fixed{mode[:1]}{algorithm}"
                fixed = (mode + algorithm, hashlib.new(algorithm, data).hexdigest())
                drvs.append(world.derive(name, "echo x > $out", fixed=fixed))
        await self.succeed(*drvs, max_jobs=2)
        self.assertTrue(all(world.is_valid(drv) for drv in drvs))

    async def test_fixed_mismatch(self) -> None:
        """B23, D16: a mismatch is told with both hashes, before the failure."""
        world = self.world
        for algorithm in "sha256", "r:sha1", "md5":
            name = algorithm.removeprefix("r:")
            data = nar_of_file(b"x\n") if algorithm.startswith("r:") else b"x\n"
            expected = hashlib.new(name, b"other")
            actual = hashlib.new(name, data)
            drv = world.derive(
                "bad" + name, "echo x > $out", fixed=(algorithm, expected.hexdigest())
            )
            observer = await self.fail_with(1, drv)
            words = [
                digest.hexdigest() if name == "md5" else to_base32(digest.digest())
                for digest in (expected, actual)
            ]
            trace = f"@ hash-mismatch {world.output(drv)} {algorithm} {' '.join(words)}"
            self.assertEqual(observer.traces[-2], trace)
            instead = f"expected {algorithm} {words[0]}, actual {words[1]}"
            self.assertEqual(observer.instead, [instead])
            self.assertTrue(observer.traces[-1].startswith(f"@ build-failed {drv} - 1 "))

    async def test_fixed_types(self) -> None:
        """B23, D16: what is fixed by its contents must be a plain file."""
        fixed = ("sha256", hashlib.sha256(b"x\n").hexdigest())
        for name, script in (
            ("exe", "echo x > $out; chmod 755 $out"),
            ("dir", "mkdir $out"),
            ("link", "ln -s x $out"),
        ):
            observer = await self.fail_with(1, self.world.derive(name, script, fixed=fixed))
            self.assertIn("should be a non-executable regular file", observer.logs[-1])

    async def test_fixed_fresh(self) -> None:
        """CVE-2024-27297, I-FRESH: a descriptor that got out of the build is of no use after it."""
        fixed = ("sha256", hashlib.sha256(b"x\n").hexdigest())
        await self.world.check_fresh(self, self.world.derive("x", "echo x > $out", fixed=fixed))

    async def test_planted_names(self) -> None:
        """CVE-2026-39860: names that a fixed-output builder plants lead nobody astray."""
        world = self.world
        canary = Path(world.top, "canary")
        canary.write_text("safe")
        fixed = ("sha256", hashlib.sha256(b"x\n").hexdigest())
        script = f"echo x > $out; ln -s {canary} $out.tmp; ln -s {canary} ${{out%/*}}/outputs"
        await self.succeed(world.derive("plant", script, fixed=fixed))
        self.assertEqual(canary.read_text(), "safe")

    async def test_constraints(self) -> None:
        """B25, D11, D12: what outputs may refer to."""
        world = self.world
        leaf = world.derive("leaf")
        middle = world.derive(
            "middle", "echo $leaf > $out", inputs=[leaf], environment={"leaf": world.output(leaf)}
        )
        middle_out, leaf_out = world.output(middle), world.output(leaf)

        def user(name: str, **rules: str) -> StorePath:
            return world.derive(
                name,
                "echo $middle > $out; echo $out >> $out",
                inputs=[middle],
                environment={"middle": middle_out, **rules},
            )

        await self.succeed(
            user("ok1", allowedReferences=f"out {middle_out}"),
            user("ok2", allowedRequisites=f"{leaf_out} {middle_out}"),
            user("ok3", disallowedReferences=leaf_out),
            user("ok4", disallowedRequisites=world.shell),
            world.derive("ok5", environment={"allowedReferences": ""}),
            max_jobs=2,
        )
        for drv, part in (
            (user("bad1", allowedReferences=middle_out), "allowedReferences"),
            (user("bad2", allowedReferences=""), "allowedReferences"),
            (user("bad3", allowedRequisites=middle_out), leaf_out),
            (user("bad4", disallowedReferences=middle_out), middle_out),
            (user("bad5", disallowedRequisites=leaf_out), f"by way of `{middle_out}'"),
            (user("bad6", allowedReferences="nope"), "invalid reference specifier"),
        ):
            observer = await self.fail_with(1, drv)
            self.assertIn(part, observer.logs[-1])
            self.assertTrue(observer.traces[-1].startswith(f"@ build-failed {drv} - 1 "))

    async def test_reference_graphs(self) -> None:
        """B19, D13: the file of exportReferencesGraph, and lists that are wrong."""
        world = self.world
        leaf = world.text("leaf", "leaf")
        user = world.text("user", leaf, [leaf])
        drv = world.derive(
            "graph",
            "cat g > $out",
            sources=[user],
            environment={"exportReferencesGraph": f"g {user}/sub"},
        )
        await self.succeed(drv)
        blocks = {leaf: f"{leaf}\n\n0\n", user: f"{user}\n\n1\n{leaf}\n"}
        text = "".join(blocks[path] for path in sorted(blocks))
        self.assertEqual(Path(world.output(drv)).read_text(), text)
        for number, words in enumerate(("g", "g /nowhere", f"g {world.top}/s/{'1' * 32}-x")):
            bad = world.derive(f"g{number}", environment={"exportReferencesGraph": words})
            observer = await self.fail_with(100, bad)
            told = f"@ build-failed {bad} - 0 `exportReferencesGraph' "
            self.assertTrue(observer.traces[-1].startswith(told))
        bad = world.derive("dot", environment={"exportReferencesGraph": f".g {user}"})
        await self.fail_with(1, bad)


@requires_root
class LogTests(TestCase):
    """B29: log files."""

    timeout = 60

    async def test_compressions(self) -> None:
        """B29: gzip, bzip2 and none; the file holds what the client got."""
        for compression, read in (
            ("gzip", gzip.open),
            ("bzip2", bz2.open),
            ("none", open),
        ):
            world = World(self, log_compression=compression)
            drv = world.derive(
                "log", "for i in 1 2 3; do echo line $i; echo err >&2; done; echo > $out"
            )
            observer = Recorder()
            await world.build(drv, observer=observer)
            path = log_file(world.settings.directories.log, drv, compression)
            self.assertIn(f" {path} ", observer.traces[0])
            with read(path, "rb") as file:  # type: ignore[operator]
                self.assertEqual(file.read().decode(), observer.text)
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o644)

    async def test_no_log(self) -> None:
        """B29: without logs the trace has an empty name and there is no file."""
        world, observer = World(self, keep_log=False), Recorder()
        await world.build(world.derive("log"), observer=observer)
        self.assertIn(f" - {world.settings.system}  ", observer.traces[0])
        self.assertFalse(os.path.lexists(world.settings.directories.log + "/drvs"))
