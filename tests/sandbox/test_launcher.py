"""Starting, stopping and losing builders."""

from __future__ import annotations

import base64
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.trial.unittest import SynchronousTestCase, TestCase

from guixd.errors import SandboxError
from guixd.sandbox.spec import Bind, File, Ids, SandboxSpec, UserNamespace
from tests.sandbox.place import BUSYBOX, Place, free_uid
from tests.support import requires_root, requires_user_namespaces


def children_of(pid: int) -> list[int]:
    """Return the process ids of the children of PID."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class _WithLauncher:
    """Tests of a launcher that hold in each mode."""

    mode = ""

    def setUp(self) -> None:
        assert isinstance(self, TestCase)
        self.place = Place(self, self.mode)

    def spec(self, script: str) -> SandboxSpec:
        return self.place.prepare(self.place.derivation(script)).spec

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
        self.assertEqual(children_of(zygote), [])

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
        before = len(os.listdir(f"/proc/{zygote}/fd"))
        specs = [self.spec(f"echo {number}") for number in range(20)]
        outcomes = await gatherResults(
            [Deferred.fromCoroutine(self.place.finish(spec)) for spec in specs]
        )
        self.assertEqual([outcome.text for outcome in outcomes], [f"{n}\n" for n in range(20)])
        self.assertEqual(len({outcome.pid for outcome in outcomes}), 20)
        self.assertEqual(len(os.listdir(f"/proc/{zygote}/fd")), before)
        self.assertEqual(children_of(zygote), [])

    async def test_bad_protocol(self) -> None:
        """B38: a protocol that raises does not disturb the launcher."""

        class Wrong:
            pass

        spec = self.spec("echo x")
        await self.place.launcher.spawn(Wrong(), spec)
        self.assertEqual((await self.place.run("echo y")).lines, ["y"])
        await self.place.launcher.stop()
        self.assertTrue(self.flushLoggedErrors(AttributeError))


_DAEMON = """
import base64, os, sys
sys.path[:] = sys.argv[2:]
from twisted.internet import reactor
from twisted.internet.protocol import ProcessProtocol
from guixd.build.launcher import ZygoteLauncher
from guixd.sandbox.spec import SandboxSpec

class Announcer(ProcessProtocol):
    def connectionMade(self):
        os.write(1, b"%d\\n" % self.transport.pid)

spec = SandboxSpec.decode(base64.b64decode(sys.argv[1]))
ZygoteLauncher(reactor).spawn(Announcer(), spec)
reactor.run()
"""


@requires_root
class BuildUserTests(_WithLauncher, TestCase):
    """With a build user."""

    mode = "users"

    async def test_daemon_dies(self) -> None:
        """X34: when the daemon dies all builders do."""
        encoded = base64.b64encode(self.spec("$b sleep 1000").encode())
        daemon = subprocess.Popen(
            [sys.executable, "-c", _DAEMON, encoded, *sys.path], stdout=subprocess.PIPE
        )
        assert daemon.stdout is not None
        with daemon.stdout:
            builder = os.pidfd_open(int(daemon.stdout.readline()))
        self.addCleanup(os.close, builder)
        daemon.kill()
        daemon.wait()
        self.assertTrue(select.select([builder], [], [], 60)[0])

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

    async def test_kill_root(self) -> None:
        """X22: never root's."""
        with self.assertRaises(SandboxError):
            await self.place.launcher.kill_user(0)


@requires_user_namespaces
class RootlessTests(_WithLauncher, TestCase):
    """With a user namespace."""

    mode = "rootless"


class PlainTests(_WithLauncher, TestCase):
    """Without a container."""

    mode = "plain"


class SpecTests(SynchronousTestCase):
    """The form in which a plan reaches the zygote."""

    def test_round_trip(self) -> None:
        """X25: nothing is lost, not even bytes that are no UTF-8."""
        full = SandboxSpec(
            "/s/b",
            ("b", "\udcff"),
            (("A", "\n"),),
            "/d",
            "/s",
            "/r",
            (File("/f", "file", 0o600, "x", 5),),
            (Bind("/a", "/b", False, True),),
            False,
            False,
            Ids(1, 2, (3,)),
            UserNamespace(1, 2, 3, 4, 5),
            False,
            8,
            "u",
            "f",
        )
        for spec in full, SandboxSpec("/s/b", (), (), "/", "/s"):
            self.assertEqual(SandboxSpec.decode(spec.encode()), spec)
