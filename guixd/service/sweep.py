"""What requests that look at the whole store have in common.

Worker threads look at some items at a time, so that others have their turn, and the
client may leave at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from guixd.build.threads import to_the_end
from guixd.service.shared import SWEEPS, Daemon

T = TypeVar("T")
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


async def in_thread(
    daemon: Daemon, stop: Callable[[], object], work: Callable[..., T], *args: Any
) -> T:
    """Return what WORK returns, which a thread does when few others look at the store.

    :param stop: lets WORK end soon, for when the caller is cancelled.
    """
    await daemon.sweeps.acquire()
    try:
        return await to_the_end(daemon.threads(work, *args), stop)
    finally:
        daemon.sweeps.release()


async def in_parallel(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do WORK in as many coroutines as there are threads for it, until all of them end.

    If one fails, or the caller is cancelled, the others are cancelled.
    """
    running = [Deferred.fromCoroutine(work()) for _ in range(SWEEPS)]
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
