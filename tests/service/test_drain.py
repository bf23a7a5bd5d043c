"""Stopping while clients are at work (spec: options §5)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.task import Clock, deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase

from guixd.client import Client, RequestFailed
from guixd.formats.path import StoreDirectory
from guixd.service import drain
from guixd.service.drain import Drain
from tests.build.test_goals import Fake
from tests.service.program import PROGRAM, TWISTD, Program
from tests.service.test_real_builds import RealCase
from tests.service.world import DaemonCase
from tests.support import is_root, processes_of


class DrainTests(SynchronousTestCase):
    """When the wait is over."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.busy = True

    def drain(self, seconds: int = 60) -> Drain:
        return Drain(self.clock, seconds, lambda: self.busy)

    def test_nothing_at_work(self) -> None:
        """O20: without work, or without time for it, there is nothing to wait for."""
        self.successResultOf(self.drain(0).over)
        self.busy = False
        self.successResultOf(self.drain().over)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_quiet(self) -> None:
        """O20: who has got an answer may ask for more; the end comes after a quiet moment."""
        waiting = self.drain()
        self.clock.advance(30)
        waiting.stirred()
        self.clock.advance(drain.QUIET)
        self.assertNoResult(waiting.over)  # something else is at work
        self.busy = False
        waiting.stirred()
        self.clock.advance(drain.QUIET / 2)
        waiting.stirred()
        self.clock.advance(drain.QUIET / 2)
        self.assertNoResult(waiting.over)
        self.clock.advance(drain.QUIET / 2)
        self.successResultOf(waiting.over)
        self.assertFalse(waiting.given_up)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_limit(self) -> None:
        """O21: what takes longer is given up; so it is when somebody is in a hurry."""
        slow, hurried = self.drain(), self.drain()
        hurried.hurry()
        self.clock.advance(60)
        for waiting in slow, hurried:
            self.successResultOf(waiting.over)
            self.assertTrue(waiting.given_up)
            waiting.hurry()
            waiting.stirred()
        self.assertEqual(self.clock.getDelayedCalls(), [])


class ClosedEngineTests(Fake):
    """O20: an engine that begins nothing more."""

    def test_close(self) -> None:
        """O20: what runs ends well; a request fails when all that is left would have to begin."""
        world = self.world
        a, b = world.derive("a"), world.derive("b")
        both = world.build(a, b, max_jobs=1)
        top = world.build(world.derive("top", inputs=[a]))
        other = world.build(world.derive("c", inputs=[b]), max_jobs=0)
        one = world.build(a)
        world.engine.close()
        self.assertIn("stopping", self.error(other).text)
        for waiting in both, top, one:
            self.assertNoResult(waiting)
        self.launcher["a"].finish()
        self.successResultOf(one)
        for waiting in both, top:
            self.assertIn("stopping", self.error(waiting).text)
        self.assertEqual(self.launcher.names, ["a"])
        self.assertIn("stopping", self.error(world.build(b)).text)
        self.successResultOf(world.build(a))
        self.assertEqual(world.leftovers(), [])


class StopTests(DaemonCase):
    """O20, O21: the service is stopped while somebody waits for a build."""

    options = {"stop_timeout": 600}

    def setUp(self) -> None:
        super().setUp()
        self.patch(drain, "QUIET", 0.01)

    async def begin(self) -> tuple[Client, Deferred[object], Deferred[None]]:
        """Return a client, its request for a build, and what ends the build."""
        client = await self.client()
        built = client.build_paths([self.path("a.drv")])
        _request, _observer, done = await self.builder.arrivals.get()
        await deferLater(reactor, 0)  # The request is not under way before this returns.
        return client, built, done

    async def test_finished(self) -> None:
        """O20: the client is told, gets its result, and may ask more before the end."""
        client, built, done = await self.begin()
        stopped = self.daemon.stop()
        self.assertTrue(self.builder.closed)
        self.assertFalse(os.path.exists(self.daemon.socket))
        done.callback(None)
        await built
        self.assertIn(b"is stopping; what runs has 600 s", b"".join(self.log))
        self.assertFalse(await client.is_valid_path(self.path("b")))
        await stopped
        self.assertTrue(self.builder.stopped)
        self.assertEqual(self.builder.cancelled, [])

    async def test_hurry(self) -> None:
        """O21: when somebody is in a hurry, what still runs is given up at once."""
        _client, built, _done = await self.begin()
        stopped = self.daemon.stop()
        self.assertFalse(self.builder.cancelled)
        self.daemon.service.hurry()
        await stopped
        self.assertEqual(len(self.builder.cancelled), 1)
        with self.assertRaisesRegex(RequestFailed, "is stopping; try again"):
            await built
        self.assertIn(b"gives up", b"".join(self.log))


class SignalTests(RealCase):
    """O20, O21: signals to a daemon with a real builder."""

    command = (*PROGRAM, "--stop-timeout=600")
    extend = b"EXTEND_TIMEOUT_USEC=660000000"
    statuses: tuple[int, ...] = (0,)

    def setUp(self) -> None:
        self.uid = 2_500_000 + 4 * os.getpid()
        users = [f"--build-uids={self.uid}-{self.uid + 1}:64001"] if is_root() else []
        self.program = Program(self, [*self.command, "--no-substitutes", *users])
        self.program.state()
        self.directory = self.program.directory
        self.store = StoreDirectory(self.directory + "/store")

    @property
    def unix(self) -> UNIXClientEndpoint:
        return UNIXClientEndpoint(reactor, self.program.socket)

    async def begin(self, script: str) -> tuple[Deferred[object], str]:
        """Let a client build SCRIPT, and tell the daemon to stop when the builder runs."""
        client = await self.client()
        drv, out = await self.derive(client, "a", script)
        begun: Deferred[None] = Deferred()

        def log(data: bytes) -> None:
            self.log.append(data)
            if not begun.called and b"begun" in data:
                begun.callback(None)

        client.log = log
        built = client.build_paths([drv])
        await begun
        self.program.process.send_signal(signal.SIGTERM)
        self.assertIn(self.extend, self.program.state())
        return built, out

    def left(self) -> list[str]:
        """Return what a stopped daemon must not leave."""
        found = [
            *Path(self.directory, "tmp").iterdir(),
            *Path(self.directory, "store").glob("*.chroot"),
        ]
        found += Path(self.directory, "var/temproots").iterdir()
        found += Path(self.directory, "var/db").glob("*-wal")
        found += Path(self.directory, "var/daemon-socket").iterdir()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        left = [mount for mount in mounts if self.directory in mount]
        left += processes_of((self.uid, self.uid + 1))
        return left + [str(each) for each in found if each.name != "guixd"]

    async def test_first(self) -> None:
        """O20: after one signal the builder ends in peace, then the daemon does."""
        built, out = await self.begin("echo begun; sleep 0.3; echo > $out")
        await built
        self.assertTrue(os.path.exists(out))
        status, output = await deferToThread(self.program.end, 0)
        self.assertIn(status, self.statuses)
        self.assertEqual(self.left(), [], output)

    async def test_second(self) -> None:
        """O21: a second signal ends the builder and the daemon at once; nothing is left."""
        built, out = await self.begin("echo begun; (setsid sleep 1000 &) ; sleep 1000")
        status, output = await deferToThread(self.program.end)
        with self.assertRaisesRegex(RequestFailed, "is stopping; try again"):
            await built
        self.assertIn(status, self.statuses)
        self.assertEqual(self.left(), [], output)
        self.assertFalse(os.path.exists(out))


class TwistdSignalTests(SignalTests):
    """O20, O21: the same under twistd, with the time that there is by default."""

    command = (*TWISTD, "--nodaemon", "--pidfile=", "guixd")
    extend = b"EXTEND_TIMEOUT_USEC=63000000"
    statuses = (0, -signal.SIGTERM)  # newer ones raise the signal again
