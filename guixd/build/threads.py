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
    """Wait until RUNNING, what a thread does, has ended, even if the caller is cancelled.

    :param stop: called when the caller is cancelled, so that the thread comes to an end soon.
    :raises CancelledError: he was, and the thread has ended now.
    """
    result: Deferred[T] = Deferred()
    ended: Deferred[None] = Deferred()

    def finished(outcome: T | Failure) -> None:
        if not result.called:
            result.callback(outcome)
        ended.callback(None)

    running.addBoth(finished)
    try:
        return await result
    except CancelledError:
        stop()
        await ended
        raise


def inline(function: Callable[..., T], /, *args: Any) -> Deferred[T]:
    """Call FUNCTION at once, in this thread: `Threads` for what is short, and for tests."""
    return maybeDeferred(function, *args)
