"""Builders that are coroutines of the daemon (W21)."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessTerminated
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.builtins import BuiltinProcess


class _Impatient(ProcessProtocol):
    """Kills the builder for the first thing it writes, as one does whose last reader has gone."""

    process: BuiltinProcess

    def __init__(self) -> None:
        self.ends: list[Failure] = []

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self.process.signalProcess("KILL")

    def processEnded(self, reason: Failure) -> None:
        self.ends.append(reason)


class KillTests(SynchronousTestCase):
    """W21: a kill in the midst of a step gives the work up, and the builder ends once."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.protocol = _Impatient()
        self.process = self.protocol.process = BuiltinProcess(self.clock, 1, self.protocol)
        self.cancelled: list[Deferred[None]] = []
        self.awaited: Deferred[None] = Deferred(self.cancelled.append)
        self.begin: Deferred[None] = Deferred()

    async def work(self) -> bool:
        await self.begin
        self.process.write("x")
        await self.awaited
        return True

    def check(self) -> None:
        self.assertEqual((self.protocol.ends, self.cancelled), ([], []))
        self.clock.advance(0)
        self.assertEqual(self.cancelled, [self.awaited])
        (reason,) = self.protocol.ends
        error: Any = reason.value
        self.assertEqual((type(error), error.signal), (ProcessTerminated, 9))

    def test_at_once(self) -> None:
        self.begin.callback(None)
        self.process.run(self.work)
        self.check()

    def test_later(self) -> None:
        self.process.run(self.work)
        self.begin.callback(None)
        self.check()
