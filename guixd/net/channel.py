"""Packets with descriptors between the daemon and a helper, over a socket that keeps them apart.

A packet is a list in JSON on one line, maybe with bytes after it.  Both sides of the fetcher
use this, and the daemon's side of the zygote.
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from errno import ENOBUFS, ENOMEM, ETOOMANYREFS
from typing import Any, TypeAlias

from twisted.internet.interfaces import IDelayedCall, IReadWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

LARGEST_DATA = 64 << 10
"""Most bytes after the line of one packet."""
_LARGEST = 160 << 10
_READ_AT_ONCE = 64
"""Most packets taken in one turn of the reactor."""
_MOST_DESCRIPTORS = 4
_PASSING = (ENOBUFS, ENOMEM, ETOOMANYREFS)
"""Errors that pass, without anything that tells; the last one: others have not taken theirs yet."""
_RETRY = 0.05
"""Seconds until what could not be sent for such an error is sent again."""

Received: TypeAlias = Callable[[list[Any], bytes, list[int]], None]


@implementer(IReadWriteDescriptor)
class Channel:
    """One end, which owns its socket.

    :param reactor: an `IReactorFDSet` and `IReactorTime`.
    :param received: gets the list, the bytes and the descriptors of each packet, which
        it closes.
    :param lost: called once when the other end is gone, or sends what is no packet, but not
        after `close`.
    """

    def __init__(
        self,
        reactor: Any,
        end: socket.socket,
        received: Received,
        lost: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._socket = end
        self._received = received
        self._lost = lost
        self._queue: deque[tuple[bytes, Sequence[int]]] = deque()
        self._later: IDelayedCall | None = None
        self._open = True
        end.setblocking(False)
        reactor.addReader(self)

    def send(
        self, message: Sequence[object], data: bytes = b"", descriptors: Sequence[int] = ()
    ) -> None:
        """Send a packet; the DESCRIPTORS are closed when they are sent, or cannot be."""
        if not self._open:
            _close(descriptors)
            return
        self._queue.append((json.dumps(message).encode() + b"\n" + data, descriptors))
        if len(self._queue) == 1:
            self.doWrite()

    def close(self) -> None:
        """Hang up."""
        if self._open:
            self._open = False
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
            if self._later is not None:
                self._later.cancel()
            self._socket.close()
            while self._queue:
                _close(self._queue.popleft()[1])

    def drain(self) -> None:
        """Take all that has come; for when the other end is dead."""
        while self._open and self._read_one():
            pass

    # The reactor's side.

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "channel"

    def doWrite(self) -> None:
        self._later = None
        while self._queue and self._open:
            packet, descriptors = self._queue[0]
            try:
                socket.send_fds(self._socket, [packet], descriptors, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._reactor.addWriter(self)
                return
            except OSError as error:
                if error.errno in _PASSING:
                    self._reactor.removeWriter(self)
                    self._later = self._reactor.callLater(_RETRY, self.doWrite)
                    return
                # The other end is gone, which reading tells.
            self._queue.popleft()
            _close(descriptors)
        if self._open:
            self._reactor.removeWriter(self)

    def doRead(self) -> None:
        for _ in range(_READ_AT_ONCE):
            if not self._open or not self._read_one():
                return

    def _read_one(self) -> bool:
        try:
            packet, descriptors, _flags, _ = socket.recv_fds(
                self._socket, _LARGEST, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        except OSError:
            packet, descriptors = b"", []
        line, _, data = packet.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):  # It is at its end, or talks nonsense.
            _close(descriptors)
            self.close()
            self._lost()
            return False
        self._received(message, data, descriptors)
        return True

    def connectionLost(self, reason: Failure) -> None:
        if self._open:
            self.close()
            self._lost()


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
