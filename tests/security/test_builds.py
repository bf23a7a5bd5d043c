"""Builds that attack or go wrong, through a whole daemon with build users."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread

from guixd.client import Client, RequestFailed
from guixd.formats import operations as op
from guixd.formats.path import StorePath
from guixd.settings import UidRange
from tests.security.test_requests import resident
from tests.service.test_real_builds import FIRST_UID, RealCase
from tests.service.world import EndpointAs, set_options
from tests.support import processes_of, requires_root

FOREIGNER = 61998
FIRST = FIRST_UID + 8
"""Of the build users here; other modules use the numbers before it."""
PIPES = ("begun", "other", "go", "end", "never")
"""By which the builders and the tests wait for each other."""


def mounts(directory: str) -> list[str]:
    """Return what is mounted, without numbers that change and the mounts of other tests.

    :param directory: the running test's own.
    """
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    ours = (line for line in lines if directory in line or "/guixd-test-" not in line)
    return [line.split(" ", 3)[3] for line in ours]


@requires_root
class BuildCase(RealCase):
    """`shared` is a directory that builders see as `/shared`, to talk to the test."""

    timeout = 60
    users = 2

    def setUp(self) -> None:
        super().setUp()
        self.mounts = mounts(self.directory)

    def make(self, **options: Any) -> Any:
        self.shared = Path(self.directory, "shared")
        self.shared.mkdir()
        self.shared.chmod(0o777)
        for name in PIPES:
            os.mkfifo(self.shared / name)
            self.shared.joinpath(name).chmod(0o666)
        return super().make(
            build_uids=UidRange(FIRST, self.users, 64001),
            chroot_directories=(("/shared", str(self.shared)),),
            **options,
        )

    @property
    def foreigner(self) -> EndpointAs:
        """Where an ordinary user connects."""
        return EndpointAs(self.daemon.socket, FOREIGNER)

    async def prepare(
        self, client: Client, name: str, script: str, **fields: Any
    ) -> tuple[StorePath, StorePath]:
        """Add a derivation that runs SCRIPT and has FIELDS; return it and its output.

        In the script `b` is a program with the usual tools, `await NAME` waits for `tell`,
        and `: > /shared/NAME` for `told`.
        """
        script = (
            f"b={await self.tools(client)}/busybox;"
            'await() { read line < "/shared/$1"; };' + script
        )
        return await self.derive(client, name, script, **fields)

    async def told(self, name: str) -> None:
        """Wait until a builder opens the pipe NAME for writing."""
        command = ["cat", str(self.shared / name)]
        await deferToThread(subprocess.run, command, check=True, timeout=30)

    async def tell(self, name: str) -> None:
        """Let a builder that awaits NAME go on."""
        command = ["sh", "-c", 'echo > "$1"', "sh", str(self.shared / name)]
        await deferToThread(subprocess.run, command, check=True, timeout=30)

    async def fails_with(self, status: int, client: Client, drv: StorePath) -> str:
        """Build DRV, which must fail with STATUS; return the text."""
        error = await self.assertFailure(client.build_paths([drv]), RequestFailed)
        self.assertEqual(error.status, status, error.text)
        return error.text

    async def nothing_left(self) -> None:
        """End the daemon and test that nothing of its builds is left but the store's items."""
        await self.daemon.stop()
        self.assertEqual(mounts(self.directory), self.mounts)
        self.assertEqual(processes_of(range(FIRST, FIRST + self.users)), [])
        self.assertEqual(os.listdir(self.directory + "/tmp"), [])
        self.assertEqual([n for n in os.listdir(self.store.path) if n.endswith(".chroot")], [])


class SharingTests(BuildCase):
    async def test_both_see_the_log(self) -> None:
        """P28, B7: one builder, and both clients see its log from the start to the end."""
        first, second = await self.client(), await self.client()
        logs: list[list[bytes]] = [[], []]
        first.log, second.log = logs[0].append, logs[1].append
        script = "echo begun; : > /shared/begun; await go; echo done; echo x > $out"
        drv, out = await self.prepare(first, "s", script)
        for client in first, second:
            await client.set_options(set_options())
        building = first.build_paths([drv])
        await self.told("begun")
        joined: Deferred[None] = Deferred()

        def note(data: bytes) -> None:
            logs[1].append(data)
            if b"begun" in data:
                joined.callback(None)

        second.log = note
        also = second.build_paths([drv])
        await joined
        await self.tell("go")
        await gatherResults([building, also])
        self.assertEqual(Path(out).read_text(), "x\n")
        texts = [b"".join(log) for log in logs]
        self.assertEqual(texts[0], texts[1])
        self.assertEqual(texts[0].count(b"@ build-started"), 1)
        self.assertIn(b"begun\ndone\n", texts[0])
        await self.nothing_left()

    async def test_first_leaves(self) -> None:
        """B8, P27: a build goes on for who still wants it, and ends when nobody does."""
        first, second, third = [await self.client() for _ in range(3)]
        drv, out = await self.prepare(first, "s", ": > /shared/begun; await go; echo x > $out")
        other, other_out = await self.prepare(first, "t", ": > /shared/other; await never")
        lost = first.build_paths([drv])
        await self.told("begun")
        joined: Deferred[None] = Deferred()
        second.log = lambda data: None if joined.called else joined.callback(None)
        await second.set_options(set_options())
        building = second.build_paths([drv])
        await joined
        given_up = third.build_paths([other])
        await self.told("other")
        for client, work in (first, lost), (third, given_up):
            closing = client.close()
            await self.assertFailure(work, Exception)
            await closing
        await self.tell("go")
        await building
        self.assertEqual(Path(out).read_text(), "x\n")
        self.assertFalse(os.path.exists(other_out))
        await self.nothing_left()


class OneUserTests(BuildCase):
    users = 1
    options = {"max_jobs": 3}

    async def test_three_builds(self) -> None:
        """X20, B9: three builds share one user, one after the other, and none fails."""
        clients = [await self.client() for _ in range(3)]
        script = "$b mkdir /shared/busy; echo x > $out; $b usleep 50000; $b rmdir /shared/busy"
        drvs = [await self.prepare(clients[0], name, script) for name in "abc"]
        await gatherResults(
            [client.build_paths([drv]) for client, (drv, _) in zip(clients, drvs, strict=True)]
        )
        for _, out in drvs:
            self.assertTrue(await clients[0].is_valid_path(out))
        await self.nothing_left()


class BadBuildTests(BuildCase):
    async def test_outside(self) -> None:
        """CVE-2019-5736, B31, D14: a builder outside of the store is not run: status 100."""
        client = await self.client()
        for builder in "/bin/sh", "/proc/self/exe", "/shared/sh", self.store.path, "sh", "":
            drv, out = await self.prepare(client, "x", ": > /shared/ran", builder=builder)
            await self.fails_with(100, client, drv)
            self.assertFalse(await client.is_valid_path(out))
        self.assertEqual(sorted(os.listdir(self.shared)), sorted(PIPES))
        await self.nothing_left()

    async def test_platforms(self) -> None:
        """D23: another kernel's derivation is not tried, another machine's is."""
        client = await self.client()
        log: list[bytes] = []
        client.log = log.append
        await client.set_options(set_options())
        script = "echo x > $out"
        drv, _ = await self.prepare(client, "x", script, platform="i586-gnu")
        await self.fails_with(100, client, drv)
        self.assertIn(f"@ unsupported-platform {drv} i586-gnu\n".encode(), b"".join(log))
        drv, out = await self.prepare(client, "y", script, platform="sparc-linux")
        await client.build_paths([drv])
        self.assertTrue(await client.is_valid_path(out))
        await self.nothing_left()

    async def test_largest_limits(self) -> None:
        """O16, P21: limits of any size do no harm to the daemon's clock."""
        client = await self.client()
        for number in (1 << 63) - 1, 1 << 31, 1 << 53:
            pairs = ("build-timeout", str(number)), ("build-max-silent-time", str(number))
            await client.set_options(set_options(*pairs))
            drv, out = await self.prepare(client, f"x{number}", "echo x > $out")
            await client.build_paths([drv])
            self.assertTrue(await client.is_valid_path(out))
        await self.nothing_left()


class TimeTests(BuildCase):
    options = {"timeout": 1}

    async def test_time(self) -> None:
        """O16: `--timeout` ends an endless build with status 101."""
        client = await self.client()
        drv, _ = await self.prepare(client, "x", "while :; do $b usleep 100000; echo; done")
        await self.fails_with(101, client, drv)
        await self.nothing_left()


class SilenceTests(BuildCase):
    options = {"max_silent_time": 1}

    async def test_silence(self) -> None:
        """O16: `--max-silent-time` ends a silent build with status 101."""
        client = await self.client()
        drv, _ = await self.prepare(client, "x", "echo once; await never")
        await self.fails_with(101, client, drv)
        await self.nothing_left()


class HiddenTests(BuildCase):
    """Another user of the machine, while a build runs and when it has failed."""

    def reachable(self, path: str) -> bool:
        """Whether an ordinary user can look at PATH, or make something in it."""
        script = 'stat "$1" || ls "$1" || mkdir "$1/x" || ln /etc/hostname "$1/y"'
        user = ["setpriv", f"--reuid={FOREIGNER}", f"--regid={FOREIGNER}", "--clear-groups"]
        shell = ["sh", "-c", script, "sh", path]
        done = subprocess.run([*user, *shell], check=False, capture_output=True)
        return done.returncode == 0

    def outside(self, name: str) -> str:
        """Return the build tree of the derivation NAME.  O28: it is below TMPDIR."""
        return f"{self.directory}/tmp/guix-build-{name}.drv-0"

    async def test_during_build(self) -> None:
        """CVE-2024-38531, CVE-2024-52867, CVE-2021-27851, O28: all is closed to others."""
        client = await self.client()
        script = (
            "$b mkdir $out; $b cp $b $out/p; $b cp $b p; $b chmod 4755 $out/p p;"
            "$b chmod 777 . $out; : > /shared/begun; await go; exit 0"
        )
        drv, out = await self.prepare(client, "x", script)
        building = client.build_paths([drv])
        await self.told("begun")
        tree, store = self.outside("x") + "/top", f"{drv}.chroot/store"
        inner = store + "/" + os.path.basename(out)
        for there in tree + "/p", inner + "/p":
            self.assertEqual(os.stat(there).st_mode & 0o7777, 0o4755)
        for path in tree, tree + "/p", store, inner, inner + "/p":
            self.assertFalse(self.reachable(path), path)
        await self.tell("go")
        error = await self.assertFailure(building, RequestFailed)  # $out is group-writable
        self.assertEqual(error.status, 1)
        self.assertFalse(os.path.exists(out))
        await self.nothing_left()

    async def test_failed_outputs(self) -> None:
        """CVE-2024-52867, CVE-2025-52992: what a failed build leaves is harmless."""
        client = await self.client()
        script = (
            "test -e $out && exit 7; $b mkdir -p $out/d; $b cp $b $out/p; $b cp $b $out/d/p;"
            "$b chmod 6777 $out/p $out/d/p $out/d; $b chmod 7777 $out; exit 3"
        )
        drv, out = await self.prepare(client, "x", script)
        for _ in range(2):
            await self.fails_with(100, client, drv)
            self.assertFalse(await client.is_valid_path(out))
            for path in out, out + "/p", out + "/d", out + "/d/p":
                mode = os.stat(path).st_mode
                self.assertFalse(mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IWOTH), path)
        self.assertNotIn(b"code 7", b"".join(self.log))
        await self.nothing_left()

    async def test_kept_tree(self) -> None:
        """CVE-2021-27851, X23: a kept tree becomes its client's, when it is harmless."""
        client = await self.client(self.foreigner)
        await client.set_options(set_options(keep_failed=True))
        script = (
            "$b cp $b p; $b chmod 4777 p; $b mkdir d; $b chmod 7777 d .; $b ln -s /etc/shadow l;"
            ": > /shared/begun; await go; exit 1"
        )
        drv, _ = await self.prepare(client, "x", script)
        before = os.stat("/etc/shadow")
        building = client.build_paths([drv])
        await self.told("begun")
        self.assertFalse(self.reachable(self.outside("x") + "/top"))
        await self.tell("go")
        await self.assertFailure(building, RequestFailed)
        tree = self.outside("x")
        for name in "", "/p", "/d", "/l":
            status = os.lstat(tree + name)
            self.assertEqual(status.st_uid, FOREIGNER, name)
            if name != "/l":
                self.assertFalse(status.st_mode & 0o6002, name)
        after = os.stat("/etc/shadow")
        self.assertEqual((after.st_uid, after.st_mode), (before.st_uid, before.st_mode))
        self.assertEqual(os.listdir(self.directory + "/tmp"), ["guix-build-x.drv-0"])


class SmallDiskTests(BuildCase):
    options = {"max_jobs": 2}

    async def test_full_disk(self) -> None:
        """B36, B2, B39: a build that fills the disk fails with status 1, and frees it again."""
        await self.client()
        size = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", self.store.path]
        await self.daemon.stop()
        subprocess.run(size, check=True)
        self.addCleanup(subprocess.run, ["umount", self.store.path], check=True)
        self.mounts = mounts(self.directory)
        shutil.rmtree(self.shared)
        self.daemon = self.make(**self.options)
        self.daemon.start()
        self.addCleanup(self.daemon.stop)
        client, other = await self.client(), await self.client()
        drv, out = await self.prepare(client, "x", "$b dd if=/dev/zero of=$out bs=1M")
        script = ": > /shared/begun; await end; echo x > $out"
        fine, fine_out = await self.prepare(client, "y", script)
        also = other.build_paths([fine])
        await self.told("begun")
        await self.fails_with(1, client, drv)
        self.assertFalse(await client.is_valid_path(out))
        # Of any other failed build it is left for inspection.
        self.assertFalse(os.path.lexists(out))
        await self.tell("end")
        await also
        self.assertEqual(Path(fine_out).read_text(), "x\n")
        await self.nothing_left()


class ForkTests(BuildCase):
    options: dict[str, Any] = {}

    @property
    def place(self) -> str:
        """Where builders find the pipes."""
        return "/shared"

    async def test_forks(self) -> None:
        """X21, X24, I-DEAD: nothing outlives its builder, whatever it ignores and starts."""
        client = await self.client()
        script = (
            "trap '' TERM HUP INT;"
            "for i in 1 2 3 4 5; do"
            " ($b setsid $b sh -c \"trap '' TERM; while :; do $b sleep 1000; done\" &); done;"
            "fork() { while :; do (:) & done; }; fork & fork &"
            "(while :; do echo more >> $out; done &);"
            f": > {self.place}/begun; read line < {self.place}/go; exit 0"
        )
        drv, _ = await self.prepare(client, "x", script)
        building = client.build_paths([drv])
        await self.told("begun")
        await self.tell("go")
        await building
        self.assertFalse(await client.verify_store(check_contents=True))
        await self.nothing_left()


class PlainForkTests(ForkTests):
    options = {"use_chroot": False}

    @property
    def place(self) -> str:
        return str(self.shared)


class HostileOutputTests(BuildCase):
    async def test_deep_trees(self) -> None:
        """X33, CVE-2025-46415: trees deeper than any name can be long are taken and removed."""
        client = await self.client()
        dig = (
            "chain=$($b seq 900 | $b sed s,.*,d/, | $b tr -d '\\n');"
            "dig() { $b mkdir t; for i in 1 2 3 4 5; do $b mkdir -p n/$chain;"
            " $b mv t n/$chain; $b mv n t; done; };"
        )
        script = f"{dig} dig; $b mkdir $out; cd $out; dig; echo x > f"
        drv, out = await self.prepare(client, "x", script)
        await client.build_paths([drv])
        self.assertGreater((await client.path_info(out)).nar_size, 4500 * 96)
        drv, out = await self.prepare(client, "y", script + "; exit 1")
        await self.fails_with(100, client, drv)
        await self.nothing_left()

    async def test_names_and_links(self) -> None:
        """X33, N8: links lead nowhere, whatever they are called and wherever they point."""
        client = await self.client()
        victim = Path(self.directory, "victim")
        victim.mkdir(mode=0o700)
        victim.joinpath("f").write_text("safe")
        victim.joinpath("f").chmod(0o600)
        script = (
            f"$b mkdir $out; cd $out; $b ln -s {victim} d; $b ln -s {victim}/f f; $b ln -s . l;"
            "$b ln -s ../../../.. up; echo x > \"$($b printf '\\377\\n\\001 -rf')\";"
            f"$b ln -s {victim} ${{out%/*}}/{'0' * 32}-planted; echo y > ${{out%/*}}/.links;"
            "cd /tmp/guix-build*; $b ln -s $out o; cd ..; $b ln -s x y; exit 0"
        )
        drv, out = await self.prepare(client, "x", script)
        await client.build_paths([drv])
        names = sorted(os.listdir(os.fsencode(out)))
        self.assertEqual(names, [b"d", b"f", b"l", b"up", b"\xff\n\x01 -rf"])
        status = victim.joinpath("f").stat()
        self.assertEqual((status.st_mode & 0o7777, status.st_uid), (0o600, 0))
        self.assertEqual(victim.stat().st_mode & 0o7777, 0o700)
        self.assertEqual(victim.joinpath("f").read_text(), "safe")
        self.assertTrue(os.path.isdir(self.store.path + "/.links"))
        self.assertEqual([n for n in os.listdir(self.store.path) if "planted" in n], [])
        link, target = await self.prepare(client, "y", f"$b ln -s {victim}/f $out")
        await client.build_paths([link])
        self.assertEqual(os.readlink(target), f"{victim}/f")
        self.assertEqual(victim.joinpath("f").stat().st_mode & 0o7777, 0o600)
        await self.nothing_left()

    async def test_flood(self) -> None:
        """P26, B13: what a builder writes without end takes no memory, read or not."""
        client = await self.client()
        client.log = len  # keep none of it
        await client.set_options(set_options())
        script = "$b yes | $b head -c 40000000; echo x > $out"
        drv, out = await self.prepare(client, "x", script)
        lazy = await self.raw(None, set_options(), op.BuildPaths((drv,)))
        lazy.transport.pauseProducing()
        before = resident()
        await client.build_paths([drv])
        self.assertLess(resident() - before, 20 << 20)
        self.assertTrue(os.path.exists(out))
        lazy.transport.loseConnection()
        await self.nothing_left()
