"""Requests that are given up, and then their connections, while threads work for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from guixd.service.adding import Intake
from guixd.service.collecting import _Remover
from tests.build.fakes import Held


class StepTests(SynchronousTestCase):
    """P27: what a thread uses is closed when it has ended, however often one gives up."""

    def test_adding(self) -> None:
        threads, addition = Held(), SimpleNamespace(feed=len, complete=False)
        intake = Intake(SimpleNamespace(), addition, threads)  # type: ignore[arg-type]
        intake.received(bytes(1 << 20))
        intake.done.cancel()
        self.failureResultOf(intake.done, CancelledError)
        self.check(threads, Deferred.fromCoroutine(intake.idle()))

    def test_collecting(self) -> None:
        threads, names = Held(), [["a"], []]
        collection = SimpleNamespace(take_moved=names.pop, empty=len)
        names.reverse()
        session: Any = SimpleNamespace(daemon=SimpleNamespace(threads=threads))
        remover = _Remover(session, collection)  # type: ignore[arg-type]
        remover.go_on()
        collection.take_moved = list
        self.check(threads, Deferred.fromCoroutine(remover.stop()))

    def check(self, threads: Held, waiting: Deferred[None]) -> None:
        for _ in range(2):
            waiting.cancel()
            self.assertNoResult(waiting)
        threads.go_on()
        self.successResultOf(waiting)
