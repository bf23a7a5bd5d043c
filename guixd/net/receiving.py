"""Taking a body that the fetcher sends through a pipe, with back-pressure."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from guixd.errors import FetchError
from guixd.net.reach import Reach
from guixd.net.requests import Fetched, Head, Request

PIPE = 1 << 20
"""How much may wait in the pipe, in bytes."""
_STEP = 8 << 20
"""Most bytes taken by one call of a thread."""
_QUICK = 32 << 10
"""So little is taken at once, in the reactor's thread."""


class FetcherLike(Protocol):
    """`interfaces.IFetcher` for the type checker."""

    def start(self) -> None: ...

    def fetch(
        self,
        request: Request,
        sink: int,
        *,
        head: Callable[[Head], None] | None = None,
        progress: Callable[[int], None] | None = None,
        source: int | None = None,
    ) -> Deferred[Fetched]: ...

    def lookup(
        self,
        urls: Any,
        answered: Any,
        *,
        fields: Any = None,
        verify: bool = False,
        nearest: Reach = Reach.LOOPBACK,
    ) -> Deferred[None]: ...

    def stop(self) -> Deferred[None]: ...


async def receive(
    reactor: Any,
    threads: Callable[..., Deferred[Any]],
    fetcher: FetcherLike,
    request: Request,
    consume: Callable[[bytes], object],
    *,
    head: Callable[[Head], None] | None = None,
    progress: Callable[[int], None] | None = None,
    source: int | None = None,
) -> Fetched:
    """Fetch REQUEST and pass the body on.

    :param threads: where CONSUME may be called.
    :param consume: takes the next bytes, one call at a time, maybe in a thread; what it
        raises ends the transfer and is raised here.
    :param head: called before the first CONSUME, and when the body goes on after it broke
        off; what it raises likewise.
    :param progress: see `IFetcher.fetch`, also for SOURCE.
    :raises FetchError: the body is not complete; parts may have been passed on.
    """
    try:
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if source is not None:
            os.close(source)
        raise FetchError("fetcher", f"no pipe: {error.strerror}") from None
    try:
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE)
    except OSError:
        pass  # There is a limit for all pipes of a user.
    pipe = _Pipe(reactor, threads, read_end, consume, request.limit)
    problem: list[Exception] = []

    def began(what: Head) -> None:
        try:
            if head is not None:
                head(what)
        except Exception as error:  # noqa: BLE001
            problem.append(error)
            pipe.give_up()
            fetching.cancel()
        else:
            pipe.start()

    def stopped(failure: Failure) -> None:
        problem.append(failure.value)  # type: ignore[arg-type]
        fetching.cancel()

    pipe.ended.addErrback(stopped)
    fetching = fetcher.fetch(request, write_end, head=began, progress=progress, source=source)
    try:
        fetched = await fetching
        pipe.start()
        await pipe.ended
        if problem:  # of the last piece, or who waited gave up
            raise problem[0]
    except BaseException:
        await pipe.close()
        if problem:
            raise problem[0] from None
        raise
    if pipe.taken != fetched.written:
        raise FetchError("fetcher", "the process that downloads has lost data")
    return fetched


@implementer(IReadDescriptor)
class _Pipe:
    """The reading end.

    :ivar ended: fires at the end of the data when all is consumed, or fails.
    :ivar started: whether it is read.
    :ivar taken: how many bytes were consumed.
    """

    def __init__(
        self,
        reactor: Any,
        threads: Callable[..., Deferred[Any]],
        descriptor: int,
        consume: Callable[[bytes], object],
        limit: int | None,
    ) -> None:
        self.ended: Deferred[None] = Deferred()
        self._reactor = reactor
        self._threads = threads
        self._descriptor = descriptor
        self._consume = consume
        self._limit = limit
        self.taken = 0
        self.started = False
        self._step: Deferred[Any] | None = None
        self._closing: Deferred[None] | None = None
        self._open = True

    def start(self) -> None:
        """Begin to read, if that was not done yet."""
        if self._open and not self.started:
            self.started = True
            self._reactor.addReader(self)

    def give_up(self) -> None:
        """Read no more."""
        if self._open:
            self._reactor.removeReader(self)
            if self._step is None:
                self._close()

    async def close(self) -> None:
        """Read no more; return when nothing is consumed any more, also if cancelled."""
        self.give_up()
        while self._step is not None:
            self._closing = Deferred()
            with suppress(CancelledError):
                await self._closing

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._reactor.removeReader(self)
            os.close(self._descriptor)
            self._descriptor = -1

    def fileno(self) -> int:
        return self._descriptor

    def logPrefix(self) -> str:
        return "pipe"

    def connectionLost(self, reason: Failure) -> None:
        if self._open:
            self._finish(None)  # All is read, and the other end is closed.

    def doRead(self) -> None:
        try:
            data = os.read(self._descriptor, _QUICK)
        except BlockingIOError:
            return
        if len(data) < _QUICK:
            try:
                if data:
                    self._take(data)
            except Exception:  # noqa: BLE001
                self._finish(Failure())  # type: ignore[no-untyped-call]
            else:
                if not data:
                    self._finish(None)
            return
        self._reactor.removeReader(self)
        self._step = self._threads(self._read_on, data)
        self._step.addBoth(self._stepped)

    def _read_on(self, data: bytes) -> bool:
        """Consume DATA and what more there is now; return whether that was all for ever."""
        self._take(data)
        taken = len(data)
        while taken < _STEP:
            try:
                data = os.read(self._descriptor, PIPE)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    return False
                raise
            if not data:
                return True
            self._take(data)
            taken += len(data)
        return False

    def _take(self, data: bytes) -> None:
        self.taken += len(data)
        if self._limit is not None and self.taken > self._limit:
            raise FetchError("limit", f"more than {self._limit} bytes came")
        self._consume(data)

    def _stepped(self, result: bool | Failure) -> None:
        self._step = None
        if self._closing is not None:
            self._close()
            self._closing.callback(None)
        elif isinstance(result, Failure):
            self._finish(result)
        elif result:
            self._finish(None)
        else:
            self._reactor.addReader(self)

    def _finish(self, result: Failure | None) -> None:
        self._close()
        if isinstance(result, Failure):
            self.ended.errback(result)
        else:
            self.ended.callback(None)
