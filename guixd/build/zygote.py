"""The zygote process as the reactor sees it: packets out, packets in, and its end."""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFDSet, IReadWriteDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from guixd.net.helpers import Death, start_helper
from guixd.sandbox.zygote import LARGEST_PACKET

_log = Logger()

_BOOT = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from guixd.sandbox.zygote import main; main(int(sys.argv[1]))"
)
_READ_AT_ONCE = 64
"""Most packets taken in one turn of the reactor."""


@implementer(IReadWriteDescriptor)
class Zygote:
    """A zygote that runs.

    :ivar ended: fires with None when the process is dead and all its packets are handled.
    """

    def __init__(self, reactor: IReactorFDSet, answered: Callable[[list[Any]], None]) -> None:
        """Start the process.

        :param answered: called with each packet, see `guixd.sandbox.zygote`.
        :raises OSError: it cannot be started.
        """
        self.ended: Deferred[None] = Deferred()
        self._reactor = reactor
        self._answered = answered
        self._queue: deque[tuple[bytes, Sequence[int]]] = deque()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            environ = {"PATH": os.environ.get("PATH", os.defpath)}
            self._process = start_helper(_BOOT, theirs, environ)
        self._socket.setblocking(False)
        self._death = Death(reactor, self._process.pid, self._ended)
        self._open = True
        reactor.addReader(self)

    @property
    def pid(self) -> int:
        """The process id of the zygote."""
        return self._process.pid

    def send(self, request: Sequence[object], *descriptors: int) -> None:
        """Send REQUEST; the DESCRIPTORS are closed when they are sent."""
        if not self._open:
            _close(descriptors)
            return
        self._queue.append((json.dumps(request).encode(), descriptors))
        if len(self._queue) == 1:
            self.doWrite()

    def close(self) -> None:
        """Hang up, so that the zygote ends; no more answers are wanted."""
        if self._open:
            self._open = False
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
            self._socket.close()
            while self._queue:
                _close(self._queue.popleft()[1])

    # The reactor's side.

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "zygote"

    def doWrite(self) -> None:
        while self._queue and self._open:
            packet, descriptors = self._queue[0]
            try:
                socket.send_fds(self._socket, [packet], descriptors, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._reactor.addWriter(self)
                return
            except OSError:  # It is dying, which `Death` tells.
                pass
            self._queue.popleft()
            _close(descriptors)
        self._reactor.removeWriter(self)

    def doRead(self) -> None:
        for _ in range(_READ_AT_ONCE):
            if not self._open or not self._read_one():
                return

    def _read_one(self) -> bool:
        try:
            packet = self._socket.recv(LARGEST_PACKET)
        except BlockingIOError:
            return False
        except OSError:
            packet = b""
        if not packet:
            self._reactor.removeReader(self)
            return False
        self._answered(json.loads(packet))
        return True

    def connectionLost(self, reason: Failure) -> None:
        self.close()

    def _ended(self) -> None:
        while self._open and self._read_one():
            pass
        self.close()
        status = self._process.wait()
        _log.debug("zygote {pid} ended: {status}", pid=self._process.pid, status=status)
        self.ended.callback(None)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
