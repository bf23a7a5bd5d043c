"""Running blocking steps in worker threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

T = TypeVar("T")


class Threads(Protocol):
    """Calls a function somewhere it may block; the Deferred gets what it returns."""

    def __call__(self, function: Callable[..., T], /, *args: Any) -> Deferred[T]: ...


def pool_threads(reactor: IReactorFromThreads, pool: ThreadPool) -> Threads:
    """Return `Threads` that use POOL, which the caller starts and stops."""

    def call(function: Callable[..., T], /, *args: Any) -> Deferred[T]:
        return deferToThreadPool(reactor, pool, function, *args)

    return call


async def to_the_end(running: Deferred[T], stop: Callable[[], object] = lambda: None) -> T:
    """Wait until RUNNING, what a thread does, has ended, also if the caller is cancelled.

    :param stop: called when the caller is cancelled, once, so that the thread ends soon.
    :raises CancelledError: he was, and the thread has ended now.
    """
    outcomes: list[T | Failure] = []
    waiting: Deferred[None] = Deferred()

    def finished(outcome: T | Failure) -> None:
        outcomes.append(outcome)
        waiting.callback(None)

    running.addBoth(finished)
    gone = False
    while not outcomes:
        try:
            await waiting
        except CancelledError:
            waiting = Deferred()
            if not gone:
                gone = True
                stop()
    if gone:
        raise CancelledError
    (outcome,) = outcomes
    if isinstance(outcome, Failure):
        outcome.raiseException()
    return outcome


def inline(function: Callable[..., T], /, *args: Any) -> Deferred[T]:
    """Call FUNCTION at once, in this thread: `Threads` for what is short, and for tests."""
    return maybeDeferred(function, *args)
