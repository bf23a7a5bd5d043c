"""Notice that a peer leaves although its data are not read."""

from __future__ import annotations

import select
import socket as sockets
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer


@implementer(IReadDescriptor)
class HangupWatch:
    """Calls back once when the peer of a socket has shut down or closed its end.

    An epoll descriptor is readable when one of its members is ready, so that
    it can itself be watched by any reactor; ours waits for EPOLLRDHUP alone.
    """

    __slots__ = ("_callback", "_epoll", "_reactor")

    def __init__(self, reactor: Any, socket: sockets.socket, callback: Callable[[], None]) -> None:
        """Begin to watch SOCKET on REACTOR, an `IReactorFDSet`."""
        self._reactor = reactor
        self._callback = callback
        self._epoll = select.epoll()
        self._epoll.register(socket.fileno(), select.EPOLLRDHUP | select.EPOLLHUP)
        reactor.addReader(self)

    def fileno(self) -> int:
        """Return the number of the descriptor, -1 after `stop`."""
        return -1 if self._epoll.closed else self._epoll.fileno()

    def doRead(self) -> None:
        """Tell, once."""
        self.stop()
        self._callback()

    def stop(self) -> None:
        """Watch no more."""
        if not self._epoll.closed:
            self._reactor.removeReader(self)
            self._epoll.close()

    def connectionLost(self, reason: Failure) -> None:
        """The reactor gives the descriptor up."""
        self.stop()

    def logPrefix(self) -> str:
        """Name this in logs."""
        return "guixd"
