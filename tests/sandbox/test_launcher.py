"""Starting, stopping and losing builders."""

from __future__ import annotations

import base64
import contextlib
import marshal
import os
import pickle
import select
import signal
import subprocess
import sys
from dataclasses import replace
from errno import ENOSPC
from itertools import groupby
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase

from guixd.build.program import beginning, prepare
from guixd.build.setups import advice
from guixd.errors import SandboxError
from guixd.formats.path import StoreDirectory
from guixd.sandbox import kernel
from guixd.sandbox.phases import CALLS
from guixd.sandbox.spec import Base, Bind, File, Ids, SandboxSpec, Uplink, UserNamespace
from tests.sandbox.place import BUSYBOX, Place, free_uid
from tests.support import last_descriptor, requires_root, requires_user_namespaces


def children_of(pid: int) -> list[int]:
    """Return the process ids of the children of PID."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def pidfds_of(pid: int) -> list[int]:
    """Return descriptors of the children of PID; some may have ended meanwhile."""
    found = []
    for child in children_of(pid):
        with contextlib.suppress(ProcessLookupError):
            found.append(os.pidfd_open(child))
    return found


def name_of(pid: int) -> str:
    """Return the name of the process PID; nothing if there is none any more."""
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def builders_of(pid: int) -> list[int]:
    """Return the process ids of the builders of a zygote, without processes that wait."""
    names = {child: name_of(child) for child in children_of(pid)}
    return [child for child, name in names.items() if name and not name.startswith("guixd-")]


def descriptors_of(pid: int) -> list[str]:
    """Return what is open in a zygote besides its sockets to processes that wait."""
    directory, links = f"/proc/{pid}/fd", []
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"{directory}/{name}"))
    return sorted(link for link in links if not link.startswith("socket:"))


class _WithLauncher:
    """Tests of a launcher that hold in each mode."""

    mode = ""

    def setUp(self) -> None:
        assert isinstance(self, TestCase)
        self.place = Place(self, self.mode)

    def spec(self, script: str) -> SandboxSpec:
        return self.place.prepare(self.place.derivation(script)).spec

    def spec_of_survivor(self) -> SandboxSpec:
        """Return a builder that asks the kernel not to kill it with its parent, then says so."""
        inner = "sh -c '$b sleep 1000 & echo go; wait'"
        spec = self.spec(f"export b; exec /usr/bin/setpriv --pdeathsig clear $b {inner}")
        if spec.base is None:
            return spec
        system = (Bind(name, name, optional=True) for name in ("/usr", "/lib", "/lib64"))
        return replace(spec, binds=(*spec.binds, *system))

    async def test_success(self) -> None:
        """B38: a builder that closes its output is waited for."""
        process, recorder = await self.place.spawn(
            self.spec("exec > /dev/null 2>&1; $b sleep 0.1; $b touch done")
        )
        reason = await recorder.ended
        self.assertIsInstance(reason, ProcessDone)
        trees = self.place.directory + "/tmp"
        self.assertEqual([files for _, _, files in os.walk(trees) if files], [["done"]])
        self.assertEqual(len(process.usage or ()), 3)
        self.assertRaises(ProcessExitedAlready, process.signalProcess, "KILL")

    async def test_exit_code(self) -> None:
        """B31: the exit code of a builder."""
        _, recorder = await self.place.spawn(self.spec("echo a; echo b >&2; exit 42"))
        reason = await recorder.ended
        self.assertIsInstance(reason, ProcessTerminated)
        self.assertEqual((reason.exitCode, reason.signal), (42, None))
        self.assertEqual(recorder.output, b"a\nb\n")

    async def test_kill(self) -> None:
        """X21: a builder that is killed, with all that it started."""
        process, recorder = await self.place.spawn(self.spec("$b sleep 1000 & echo x; wait"))
        await recorder.hear(b"x\n")
        process.signalProcess("KILL")
        reason = await recorder.ended
        self.assertEqual(reason.signal, signal.SIGKILL)

    async def test_cancel(self) -> None:
        """X34: a start that is given up leaves no process."""
        spawning = self.place.launcher.spawn(None, self.spec("$b sleep 1000"))
        zygote = self.place.launcher.zygote_pid
        spawning.cancel()
        with self.assertRaises(CancelledError):
            await spawning
        self.assertEqual(builders_of(zygote), [])

    async def test_back_pressure(self) -> None:
        """P26: nothing is read while the reader rests, and nothing gets lost."""
        process, recorder = await self.place.spawn(
            self.spec("echo start; $b head -c 1000000 /dev/zero; echo end")
        )
        process.pauseProducing()
        before = len(recorder.output)
        _, other = await self.place.spawn(self.spec("echo other"))
        await other.ended
        self.assertEqual(len(recorder.output), before)
        process.resumeProducing()
        await recorder.ended
        self.assertEqual(recorder.output, b"start\n" + bytes(1000000) + b"end\n")

    async def test_lost_zygote(self) -> None:
        """X34: when the zygote dies so do its builders; the next build starts another."""
        process, recorder = await self.place.spawn(self.spec("echo go; $b sleep 1000"))
        await recorder.hear(b"go")
        pidfd = os.pidfd_open(process.pid)
        self.addCleanup(os.close, pidfd)
        first = self.place.launcher.zygote_pid
        os.kill(first, signal.SIGKILL)
        reason = await recorder.ended
        self.assertEqual(reason.signal, signal.SIGKILL)
        self.assertIn(b"has died", recorder.output)
        self.assertTrue(select.select([pidfd], [], [], 60)[0])
        self.assertEqual((await self.place.run("echo again")).lines, ["again"])
        self.assertNotEqual(self.place.launcher.zygote_pid, first)
        self.flushLoggedErrors()

    async def test_lost_zygote_unnoticed(self) -> None:
        """X34: so does a builder that has asked the kernel not to kill it, and first."""
        process, recorder = await self.place.spawn(self.spec_of_survivor())
        await recorder.hear(b"go")
        pidfd = os.pidfd_open(process.pid)
        self.addCleanup(os.close, pidfd)
        os.kill(self.place.launcher.zygote_pid, signal.SIGKILL)
        await recorder.exited
        self.assertTrue(select.select([pidfd], [], [], 0)[0])
        self.flushLoggedErrors()

    async def test_stop(self) -> None:
        """X34: stopping kills builders; then nothing can be started."""
        _, recorder = await self.place.spawn(self.spec("$b sleep 1000"))
        zygote = self.place.launcher.zygote_pid
        await self.place.launcher.stop()
        await recorder.ended
        self.assertFalse(os.path.exists(f"/proc/{zygote}"))
        with self.assertRaises(SandboxError):
            await self.place.run("true")
        await self.place.launcher.stop()

    async def test_many(self) -> None:
        """X12: builders at the same time; afterwards the zygote has no descriptor more."""
        await self.place.run("true")
        zygote = self.place.launcher.zygote_pid
        before = await self.descriptors()
        specs = [self.spec(f"echo {number}") for number in range(20)]
        outcomes = await gatherResults(
            [Deferred.fromCoroutine(self.place.finish(spec)) for spec in specs]
        )
        self.assertEqual([outcome.text for outcome in outcomes], [f"{n}\n" for n in range(20)])
        self.assertEqual(len({outcome.pid for outcome in outcomes}), 20)
        self.assertEqual(builders_of(zygote), [])
        self.assertEqual(await self.descriptors(), before)

    async def descriptors(self) -> list[str]:
        """Return those that the zygote has while it does not fork; one pipe is its own."""
        while True:
            found = descriptors_of(self.place.launcher.zygote_pid)
            if len([name for name in found if name.startswith("pipe:")]) <= 2:
                return found
            await deferLater(reactor, 0.01)

    async def test_lost_waiting(self) -> None:
        """X34: processes that wait for a build may die; those left end with the zygote."""
        await self.place.run("true")
        zygote = self.place.launcher.zygote_pid
        for _ in range(2):
            for pidfd in pidfds_of(zygote):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], 60)
                os.close(pidfd)
            self.assertEqual((await self.place.run("echo again")).lines, ["again"])
        _, recorder = await self.place.spawn(self.spec("$b sleep 1000"))
        left = pidfds_of(zygote)
        os.kill(zygote, signal.SIGKILL)
        await recorder.ended
        for pidfd in left:
            self.addCleanup(os.close, pidfd)
            self.assertTrue(select.select([pidfd], [], [], 60)[0])
        self.flushLoggedErrors()

    async def test_alternate(self) -> None:
        """X28: what waits for one kind of build is not used for another."""
        for _ in range(2):
            up = await self.place.run("$b ip -o link")
            down = await self.place.run("$b ip -o link", fixed=True)
            if self.mode != "plain":
                self.assertIn("LOOPBACK,UP", up.text)
                self.assertNotIn("LOOPBACK,UP", down.text)

    async def test_bad_protocol(self) -> None:
        """B38: a protocol that raises does not disturb the launcher."""

        class Wrong:
            pass

        spec = self.spec("echo x")
        await self.place.launcher.spawn(Wrong(), spec)
        self.assertEqual((await self.place.run("echo y")).lines, ["y"])
        await self.place.launcher.stop()
        self.assertTrue(self.flushLoggedErrors(AttributeError))


_LEAVES = "echo $($b setsid $b sh -c 'echo $$; exec $b sleep 1000 > /dev/null 2>&1' &)"

_DAEMON = """
import base64, os, pickle, sys
sys.path[:] = sys.argv[2:]
from twisted.internet import reactor
from twisted.internet.protocol import ProcessProtocol
from guixd.build.launcher import ZygoteLauncher

class Announcer(ProcessProtocol):
    def childDataReceived(self, descriptor, data):
        os.write(1, b"%d\\n" % self.transport.pid)

spec = pickle.loads(base64.b64decode(sys.argv[1]))
ZygoteLauncher(reactor).spawn(Announcer(), spec)
reactor.run()
"""


class _WithBuildUser(_WithLauncher):
    async def test_daemon_dies(self) -> None:
        """X34: when the daemon dies all builders do, whatever they have asked the kernel."""
        encoded = base64.b64encode(pickle.dumps(self.spec_of_survivor()))
        daemon = subprocess.Popen(
            [sys.executable, "-c", _DAEMON, encoded, *sys.path], stdout=subprocess.PIPE
        )
        self.addCleanup(daemon.kill)
        assert daemon.stdout is not None
        with daemon.stdout:
            builder = int(daemon.stdout.readline())
        pidfds = [os.pidfd_open(builder), *pidfds_of(builder)]
        daemon.kill()
        daemon.wait()
        for pidfd in pidfds:
            self.addCleanup(os.close, pidfd)
            self.assertTrue(select.select([pidfd], [], [], 60)[0])
        self.assertEqual(len(pidfds), 2)


@requires_root
class BuildUserTests(_WithBuildUser, TestCase):
    """With a build user."""

    mode = "users"

    async def test_kill_user(self) -> None:
        """X20, X22: all processes of a user die, and he alone is concerned."""
        uid = free_uid()
        command = [BUSYBOX, "sh", "-c", "echo up; exec sleep 1000"]
        mine, other = (
            subprocess.Popen(
                command,
                user=user,
                group=65534,
                extra_groups=[],
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            for user in (uid, uid + 1_000_000)
        )
        self.addCleanup(other.wait)
        self.addCleanup(other.kill)
        for process in mine, other:
            assert process.stdout is not None
            with process.stdout:
                process.stdout.readline()
        await self.place.launcher.kill_user(uid)
        self.assertEqual(mine.wait(0), -signal.SIGKILL)
        self.assertIsNone(other.poll())
        await self.place.launcher.kill_user(uid)

    async def test_kill_by_any_id(self) -> None:
        """X21: who has a user's id from a program of his that is setuid dies, too; large ids."""
        for uid in free_uid(), 0x80000000 + free_uid():
            become = f"import os; os.setresuid({uid + 1_000_000}, {uid}, {uid}); "
            process = subprocess.Popen(
                [sys.executable, "-Ic", become + "print('up', flush=True); os.read(0, 1)"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
            assert process.stdin is not None and process.stdout is not None
            with process.stdin, process.stdout:
                process.stdout.readline()
                await self.place.launcher.kill_user(uid)
                self.assertEqual(process.wait(30), -signal.SIGKILL)

    async def test_kill_root(self) -> None:
        """X22: never root's."""
        with self.assertRaises(SandboxError):
            await self.place.launcher.kill_user(0)

    async def test_no_descriptors(self) -> None:
        """X25: where nothing can be opened any more, what helps is told."""
        wanted = "Too many open files; the daemon needs a larger limit"
        with self.assertRaisesRegex(SandboxError, wanted), last_descriptor(free=False):
            await self.place.launcher.kill_user(free_uid())

    async def test_later_mount(self) -> None:
        """X5: a build sees what has been mounted since the last one."""
        await self.place.run("true")
        source = self.place.item("mounted")
        os.mkdir(source)
        script = f"$b ls {source}"
        for contents in [], ["file"]:
            build = self.place.prepare(self.place.derivation(script), inputs=(source,))
            seen = await self.place.finish(build.spec)
            self.assertEqual(seen.lines, contents)
            if not contents:
                kernel.mount("none", source, "tmpfs")
                self.addCleanup(kernel.umount, source, kernel.MNT_DETACH)
                Path(source, "file").touch()


@requires_user_namespaces
class RootlessTests(_WithLauncher, TestCase):
    """With a user namespace."""

    mode = "rootless"


class PlainTests(_WithLauncher, TestCase):
    """Without a container."""

    mode = "plain"

    async def test_session(self) -> None:
        """X24: what stays in the session dies with the builder, while others build, too."""
        waits, ends = (
            replace(self.spec(script), ids=None)
            for script in ("echo go; $b sleep 1000", "$b sleep 1000 >/dev/null 2>&1 & echo $!")
        )
        process, other = await self.place.spawn(waits)
        await other.hear(b"go")
        seen = await self.place.finish(ends)
        with contextlib.suppress(ProcessLookupError):  # It is gone already.
            left = os.pidfd_open(int(seen.text))
            self.addCleanup(os.close, left)
            self.assertTrue(select.select([left], [], [], 60)[0])
        process.signalProcess("KILL")
        await other.ended

    async def test_strays(self) -> None:
        """X24: without a user, what left the session dies when no builder is left."""
        waits, leaves = (
            replace(self.spec(script), ids=None) for script in ("echo go; $b sleep 1000", _LEAVES)
        )
        process, other = await self.place.spawn(waits)
        await other.hear(b"go")
        seen = await self.place.finish(leaves)
        stray = os.pidfd_open(int(seen.text))
        self.addCleanup(os.close, stray)
        self.assertEqual(select.select([stray], [], [], 0)[0], [])
        process.signalProcess("KILL")
        await other.ended
        self.assertTrue(select.select([stray], [], [], 60)[0])


@requires_root
class PlainUserTests(_WithBuildUser, TestCase):
    """Without a container, but with a build user."""

    mode = "plain"

    async def test_left_processes(self) -> None:
        """X21: with a user, what left the builder's session is killed when that has ended."""
        assert self.place.user is not None
        # Those of other tests may not have been waited for by whoever inherited them.
        self.place.user = replace(self.place.user, uid=free_uid() + 100)
        for script, alone in ("echo 1", True), (_LEAVES, False):
            process, recorder = await self.place.spawn(self.spec(script))
            await recorder.ended
            self.assertIs(process.alone, alone)
        with contextlib.suppress(ProcessLookupError):
            stray = os.pidfd_open(int(recorder.output))
            self.addCleanup(os.close, stray)
            self.assertTrue(select.select([stray], [], [], 60)[0])


class ProgramTests(SynchronousTestCase):
    """The form in which a plan reaches the zygote."""

    def test_calls(self) -> None:
        """X25: each step names a phase and a call there is; the order is that of the phases."""
        spec = SandboxSpec(
            "/s/b",
            ("b", "\udcff"),
            (("A", "\n"),),
            "/d",
            "/s",
            Base("/r", 2),
            (File("/a/f", "file", 0o600, "\udcfe"), File("/a", "directory", 0o2711)),
            (Bind("/a", "/a/b/c", False, True),),
            ("/dev/shm", "/dev/pts"),
            ids=Ids(1, 2, (3,)),
            user_namespace=UserNamespace(1, 2, 3, 4, 5),
            loopback=False,
            unsupported_platform="u",
            foreign_platform="f",
        )
        number, steps, started, builder = marshal.loads(prepare(7, spec))
        self.assertEqual((number, started), (7, b'["started", 7, %b]'))
        self.assertEqual(builder, ("/s/b", "/s", [b"b", b"\xff"], {b"A": b"\n"}, "u", "f"))
        phases = [phase for phase, _ in groupby(steps, key=lambda step: step[0])]
        self.assertEqual(
            phases,
            [
                "loopback",
                "files",
                "bind mounts",
                "mount /dev/shm",
                "mount /dev/pts",
                "pivot root",
                "working directory",
                "personality",
                "locked mounts",
                "identity",
                "parent's death",
            ],
        )
        self.assertLessEqual({call for _, call, _ in steps}, set(CALLS))
        self.assertEqual(
            [(call, *arguments) for phase, call, arguments in steps if phase == "files"],
            [
                ("make_directory", b"a"),
                ("make_file", b"a/f", 0o600, b"\xfe"),
                ("chmod", b"a", 0o2711),
            ],
        )
        self.assertEqual(
            [(call, *arguments) for phase, call, arguments in steps if phase == "bind mounts"],
            [("make_directory", b"a/b"), ("bind", b"/a", b"a/b/c", False, True)],
        )

    def test_beginning(self) -> None:
        """X1, X4, X6: what is in each container is there first; phases have their names."""
        file, bind = File("/dev/x", "symlink", content="y"), Bind("/null", "/dev/null", False)
        base = Base("/r", 2, (file,), (bind,), ("/proc", "/dev/shm", "/dev/pts"))
        steps = marshal.loads(beginning(base))
        self.assertEqual(
            [phase for phase, _ in groupby(steps, key=lambda step: step[0])],
            [
                "namespaces",
                "loopback",
                "host names",
                "private mounts",
                "root directory",
                "files",
                "bind mounts",
                "mount /proc",
                "mount /dev/shm",
                "mount /dev/pts",
            ],
        )
        self.assertLessEqual({call for _, call, _ in steps}, set(CALLS))
        root = b"guixd", b"/r", "tmpfs", 0, "mode=755,gid=2"
        self.assertIn(("root directory", "mount", root), steps)

    def test_uplink(self) -> None:
        """X29: the network comes before any file; who moves packets is under its filter at last."""
        jail = SandboxSpec("/p", ("p",), (), "/", "", Base("/r", 2), ids=Ids(1, 2), filter=b"f")
        spec = replace(jail, filter=b"", loopback=False, uplink=Uplink(jail, True, False))
        steps = marshal.loads(prepare(1, spec))[1]
        self.assertEqual(steps[0], ("loopback", "unshare", (kernel.NEWNET,)))
        self.assertEqual(steps[1], ("network", "offer_tap", (True, False, 30.0)))
        steps = marshal.loads(prepare(1, jail))[1]
        root = b"guixd", b"/r", "tmpfs", 0, "mode=755,gid=2,size=1m"
        self.assertIn(("root directory", "mount", root), steps)
        self.assertFalse([step for step in steps if step[2] == (kernel.NEWNET,)])
        self.assertEqual(
            [step[1] for step in steps[-4:]],
            ["set_ids", "die_with_zygote", "take_tap", "install_filter"],
        )
        self.assertLessEqual({call for _, call, _ in steps}, set(CALLS))

    def test_full_disk(self) -> None:
        """X25: the kernel says the same of too many mounts and of a full disk."""
        text = advice("bind mounts", ENOSPC, "")
        self.assertIn("guix gc", text)
        self.assertIn("fs.mount-max", text)

    def test_texts(self) -> None:
        """X25: store paths become plain text, which any marshalled program is made of."""
        store = StoreDirectory("/s")
        path = store.child("0" * 32 + "-b")
        spec = SandboxSpec(
            path, (path,), ((path, path),), path, path, Base(path), (), (Bind(path, path),)
        )
        self.assertIn(path.encode(), prepare(1, spec))


class ImportTests(SynchronousTestCase):
    """What the zygote consists of."""

    def test_small(self) -> None:
        """I-FD: what is forked for each build, with privileges, has loaded little."""
        code = (
            f"import sys; sys.path = {sys.path}; import guixd.sandbox.zygote; print(*sys.modules)"
        )
        told = subprocess.run([sys.executable, "-Ic", code], capture_output=True, check=True)
        loaded = set(told.stdout.decode().split())
        self.assertIn("guixd.sandbox.phases", loaded)
        self.assertEqual(
            loaded & {"dataclasses", "inspect", "typing", "threading", "twisted"}, set()
        )
        others = {name for name in loaded if name.startswith("guixd.")}
        packages = {name.split(".")[1] for name in others}
        self.assertEqual(packages, {"sandbox", "uplink"})


LOOKING = """
import os, sys
from guixd.sandbox import zygote
os.setresuid(zygote._NOBODY, int(sys.argv[1]), 0)
print("looks", flush=True)
sys.stdin.read()
"""
"""A daemon's zygote in the moment in which it kills all processes of a user."""


@requires_root
class TwoDaemons(SynchronousTestCase):
    """Daemons that do not know of each other."""

    def test_kill_users(self) -> None:
        """X22: while one kills what a build user left, it does not hinder or kill the other."""
        uid = free_uid()
        with subprocess.Popen(
            [sys.executable, "-c", LOOKING, str(uid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            self.assertEqual(other.stdout.readline(), b"looks\n")
            code = f"from guixd.sandbox import zygote; print(zygote._has_none({uid + 1}))"
            told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            self.assertEqual(told.stdout, b"True\n")
            self.assertIsNone(other.poll())
        self.assertEqual(other.returncode, 0)
