"""Accept connections on one listening socket (spec: protocol §1)."""

from __future__ import annotations

import errno
import socket as sockets
from collections.abc import Awaitable, Callable
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from guixd.formats.messages import Greeting
from guixd.formats.path import StoreDirectory
from guixd.service.admission import Admission
from guixd.service.connection import Connection, Reactor, SessionFactory
from guixd.service.contract import Session
from guixd.service.hub import ReadHub

_log = Logger()

ACCEPTS_PER_TURN: Final = 64
RETRY_SECONDS: Final = 1.0
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@implementer(IReadDescriptor)
class Listener:
    """Serves each client of a listening socket by a `Connection`.

    When descriptors run out it stops to accept until a connection closes, or
    for a second, and goes on; clients wait in the kernel's queue meanwhile.

    :ivar connections: those that are open or whose work is not over yet.
    """

    def __init__(
        self,
        reactor: Reactor,
        socket: sockets.socket,
        session_factory: SessionFactory,
        *,
        store: StoreDirectory,
        admission: Admission | None = None,
        make: Callable[..., Connection] = Connection,
    ) -> None:
        """Serve SOCKET, which listens already; `start` begins.

        :param admission: what limits connections, if anything does.
        """
        socket.setblocking(False)
        self._reactor = reactor
        self._hub = ReadHub(reactor)
        self._socket = socket
        self._admission = admission
        self._factory = session_factory
        self._store = store
        self._make = make
        self._retry: Any = None
        self._accepting = self._closing = False
        self._stopped: Deferred[None] | None = None
        self.connections: set[Connection] = set()

    def start(self) -> None:
        """Begin to accept."""
        self._accepting = True
        self._reactor.addReader(self)

    def close(self) -> None:
        """Accept no more; who is connected stays so."""
        if not self._closing:
            self._closing = True
            self._pause()
            self._cancel_retry()
            self._socket.close()

    def stop(self) -> Deferred[None]:
        """Accept no more and disconnect all clients.

        :return: fires when all sessions are over and the socket is closed.
        """
        if self._stopped is None:
            self._stopped = Deferred()
            self.close()
            for connection in tuple(self.connections):
                connection.abort()
            self._check_stopped()
        waiting: Deferred[None] = Deferred()

        def tell(result: None) -> None:
            waiting.callback(None)

        self._stopped.addCallback(tell)
        return waiting

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 after the end."""
        return self._socket.fileno()

    def logPrefix(self) -> str:
        """Name this in logs."""
        return "guixd"

    def doRead(self) -> None:
        """Accept those who wait, up to a bound."""
        for _ in range(ACCEPTS_PER_TURN):
            try:
                socket, address = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._exhausted(error)
                    return
                _log.debug("a client left before it was accepted: {error}", error=error)
                continue
            self._serve(socket, address)

    def connectionLost(self, reason: Failure) -> None:
        """The reactor saw the listening socket fail."""
        if self._accepting:
            _log.error("the listening socket failed: {reason}", reason=reason)
            self._pause()

    def _serve(self, socket: sockets.socket, address: Any) -> None:
        try:
            connection = self._make(
                self._hub, socket, self._begin, store=self._store, closed=self._closed
            )
        except Exception:  # noqa: BLE001
            _log.failure("a client could not be served")
            socket.close()
            return
        if self._admission is not None and not self._admission.enter(connection, address):
            socket.close()
            return
        self.connections.add(connection)
        try:
            connection.start()
        except Exception:  # noqa: BLE001
            _log.failure("a client could not be served")
            connection.abort()

    def _begin(self, connection: Connection, greeting: Greeting) -> Session | Awaitable[Session]:
        if self._admission is not None:
            self._admission.greeted(connection)
        return self._factory(connection, greeting)

    def _closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if self._admission is not None:
            self._admission.leave(connection)
        if self._retry is not None:
            self._resume()
        self._check_stopped()

    def _check_stopped(self) -> None:
        if self._stopped is not None and not self.connections and not self._stopped.called:
            self._stopped.callback(None)

    def _exhausted(self, error: OSError) -> None:
        _log.error(
            "cannot accept a client now: {error}; {count} are connected",
            error=error,
            count=len(self.connections),
        )
        self._pause()
        self._retry = self._reactor.callLater(RETRY_SECONDS, self._resume)

    def _pause(self) -> None:
        self._accepting = False
        self._reactor.removeReader(self)

    def _resume(self) -> None:
        self._cancel_retry()
        if not self._closing:
            self.start()

    def _cancel_retry(self) -> None:
        retry, self._retry = self._retry, None
        if retry is not None and retry.active():
            retry.cancel()
