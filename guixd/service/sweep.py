"""What requests that look at the whole store have in common.

Worker threads look at some items at a time, so that others have their turn, and the
client may leave at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

WORKERS = 2
"""How many threads look at the store for one client; others need some, too."""
PROGRESS = 5.0
"""Seconds after which the client is told how far it is."""


class Progress:
    """Knows when to tell a client how far a long request is."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._next = clock.seconds() + PROGRESS

    def due(self) -> bool:
        """Whether it is time to tell it now."""
        now: float = self._clock.seconds()
        if now < self._next:
            return False
        self._next = now + PROGRESS
        return True


async def in_parallel(count: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do WORK in COUNT coroutines until all of them end.

    If one fails, or the caller is cancelled, the others are cancelled.
    """
    running = [Deferred.fromCoroutine(work()) for _ in range(count)]
    failures: list[Failure] = []

    def failed(failure: Failure) -> None:
        failures.append(failure)
        cancel()

    def cancel() -> None:
        for one in running:
            one.cancel()

    for one in running:
        one.addErrback(failed)
    try:
        await DeferredList(running)
    finally:
        cancel()
    if failures:
        failures[0].raiseException()
