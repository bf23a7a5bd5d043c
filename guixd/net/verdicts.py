"""Judging narinfos while more of them come, on more than one processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from guixd.formats.narinfo import Narinfo
from guixd.formats.path import StorePath

Judge = Callable[[Sequence[Narinfo]], Sequence[bool]]
"""Says of each whether a key of the access control list has signed it; blocks."""

AT_ONCE = 16
"""How many are judged in one step of a thread: each takes a third of a millisecond."""
THREADS = 2
"""How many threads judge for one question, so that some are left for others."""


class Verdicts:
    """Those narinfos of one question that are authorised.

    :param threads: calls functions where they may block.
    """

    def __init__(self, threads: Callable[..., Deferred[Any]], judge: Judge) -> None:
        self._threads = threads
        self._judge = judge
        self._waiting: list[tuple[StorePath, Narinfo]] = []
        self._running = 0
        self._good: list[StorePath] = []
        self._problem: Failure | None = None
        self._done: Deferred[None] | None = None

    def add(self, path: StorePath, found: Narinfo) -> None:
        """Judge FOUND, what was said of PATH, now or later."""
        if found.signature:
            self._waiting.append((path, found))
            if len(self._waiting) >= AT_ONCE:
                self._begin()

    def _begin(self) -> None:
        while self._waiting and self._running < THREADS:
            part, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
            self._running += 1
            judging = self._threads(self._judge, [found for _, found in part])
            judging.addCallback(self._judged, [path for path, _ in part])
            judging.addErrback(self._failed)
            judging.addBoth(self._ended)

    def _judged(self, verdicts: Sequence[bool], paths: list[StorePath]) -> None:
        self._good += [path for path, good in zip(paths, verdicts, strict=True) if good]

    def _failed(self, failure: Failure) -> None:
        self._problem = failure
        self._waiting.clear()

    def _ended(self, _: object) -> None:
        self._running -= 1
        if self._done is not None or len(self._waiting) >= AT_ONCE:
            self._begin()
        if self._done is not None and not self._running and not self._done.called:
            self._done.callback(None)

    async def all(self) -> list[StorePath]:
        """Return the paths of those that are authorised, when all are judged.

        What the judge raises is raised here.
        """
        self._done = Deferred()
        self._begin()
        if self._running:
            await self._done
        if self._problem is not None:
            self._problem.raiseException()
        return self._good
