"""Writing to a pipe whose reader may be slow."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

from twisted.internet.interfaces import IReactorFDSet, IWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer


@implementer(IWriteDescriptor)
class Sink:
    """The writing end of a pipe, which it owns.

    :param full: called with True when the reader is slow, with False when it has taken all.
    :param broken: called once if nobody reads any more.
    """

    def __init__(
        self,
        reactor: IReactorFDSet,
        descriptor: int,
        full: Callable[[bool], None],
        broken: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._full = full
        self._broken = broken
        self._queue: deque[memoryview] = deque()
        self._ended: Callable[[], None] | None = None
        os.set_blocking(descriptor, False)

    def write(self, data: bytes) -> None:
        """Write DATA, now or later."""
        if self._descriptor < 0:
            return
        waiting = bool(self._queue)
        self._queue.append(memoryview(data))
        if not waiting:
            self._flush()
            if self._queue:
                self._reactor.addWriter(self)
                self._full(True)

    def end(self, done: Callable[[], None]) -> None:
        """Close it when all is written, and call DONE."""
        if self._queue:
            self._ended = done
        else:
            self.close()
            done()

    def close(self) -> None:
        """Close it at once."""
        if self._descriptor >= 0:
            self._reactor.removeWriter(self)
            os.close(self._descriptor)
            self._descriptor = -1
            self._queue.clear()

    def _flush(self) -> None:
        while self._queue:
            part = self._queue[0]
            try:
                written = os.write(self._descriptor, part)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                self._broken()
                return
            if written < len(part):
                self._queue[0] = part[written:]
            else:
                self._queue.popleft()

    # The reactor's side.

    def fileno(self) -> int:
        return self._descriptor

    def logPrefix(self) -> str:
        return "sink"

    def doWrite(self) -> None:
        self._flush()
        if self._queue or self._descriptor < 0:
            return
        self._reactor.removeWriter(self)
        if self._ended is not None:
            self.close()
            self._ended()
        else:
            self._full(False)

    def connectionLost(self, reason: Failure) -> None:
        if self._descriptor >= 0:
            self.close()
            self._broken()
