"""A far end for connections under test, and a session that records what happens."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from guixd.formats import operations as op
from guixd.formats.messages import Greeting
from guixd.formats.operations import Operation
from guixd.formats.path import StoreDirectory, StorePath
from guixd.formats.wire import encode_int
from guixd.service.connection import Connection

GREETED = 24
"""Bytes that a greeted client has got."""
YES = encode_int(1)
IS_VALID = op.IsValidPath("/gnu/store/a")
BUILD = op.BuildPaths((StorePath("/gnu/store/a.drv"),))
ADD = op.AddToStore("name", True, True, "sha256")


class FarEnd(Protocol):
    """The client's end: gathers what comes and lets tests wait for it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.gone = False
        self._waiting: list[tuple[int | None, Deferred[bytes]]] = []

    def dataReceived(self, data: bytes) -> None:
        self.data += data
        self._serve()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.gone = True
        self._serve()

    def send(self, *data: bytes) -> None:
        """Send all DATA at once."""
        self.transport.write(b"".join(data))

    def read(self, size: int) -> Deferred[bytes]:
        """Return the next SIZE bytes; fails if the connection ends before."""
        return self._wait(size)

    def rest(self) -> Deferred[bytes]:
        """Return what comes until the connection ends."""
        return self._wait(None)

    def _wait(self, size: int | None) -> Deferred[bytes]:
        waiting: Deferred[bytes] = Deferred()
        self._waiting.append((size, waiting))
        self._serve()
        return waiting

    def _serve(self) -> None:
        while self._waiting:
            size, waiting = self._waiting[0]
            if size is None and not self.gone:
                return
            if size is not None and len(self.data) < size:
                if self.gone:
                    self._waiting.pop(0)
                    waiting.errback(AssertionError(f"{self.data!r} is not {size} bytes"))
                    continue
                return
            self._waiting.pop(0)
            taken = bytes(self.data if size is None else self.data[:size])
            del self.data[: len(taken)]
            waiting.callback(taken)


class Recorder:
    """A session whose answers are a table from type of request to function.

    :ivar events: requests, and the names of other calls, in order.
    """

    def __init__(self, connection: Connection, answers: dict[type, Callable[[Any], Any]]) -> None:
        self.connection = connection
        self.answers = answers
        self.events: list[Any] = []
        self.over: Deferred[None] = Deferred()

    def handle(self, operation: Operation[Any]) -> Any:
        self.events.append(operation)
        return self.answers[type(operation)](operation)

    def paused(self) -> None:
        self.events.append("paused")

    def resumed(self) -> None:
        self.events.append("resumed")

    def disconnected(self) -> None:
        self.events.append("disconnected")
        self.over.callback(None)


class Line:
    """A connection under test and its far end, joined by a real socket pair."""

    def __init__(
        self,
        case: TestCase,
        factory: Callable[[Connection, Greeting], Any] | None = None,
        sockets: tuple[socket.socket, socket.socket] | None = None,
    ) -> None:
        self.answers: dict[type, Callable[[Any], Any]] = {}
        self.session: Any = None
        self.greeting: Greeting | None = None
        self.closed: Deferred[None] = Deferred()
        near, far = sockets or socket.socketpair()
        self.connection = Connection(
            reactor,
            near,
            factory or self._begin,
            store=StoreDirectory(),
            closed=lambda connection: self.closed.callback(None),
        )
        self.far = FarEnd()
        with far:
            reactor.adoptStreamConnection(
                far.fileno(), far.family, Factory.forProtocol(lambda: self.far)
            )
        self.connection.start()
        case.addCleanup(self._clean)

    def _begin(self, connection: Connection, greeting: Greeting) -> Recorder:
        self.greeting = greeting
        self.session = Recorder(connection, self.answers)
        return self.session

    async def _close(self) -> None:
        self.connection.abort()
        await self.closed
        await self.far.rest()

    def _clean(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._close())

    async def greet(self, greeting: Greeting | None = None) -> None:
        """Do the handshake."""
        self.far.send((greeting or Greeting()).encode())
        await self.far.read(GREETED)


def asynchronous(function: Callable[..., Any]) -> Callable[..., Deferred[Any]]:
    """Let trial run a test that is a coroutine function."""

    def run(*arguments: Any) -> Deferred[Any]:
        return Deferred.fromCoroutine(function(*arguments))

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


def next_turn() -> Deferred[None]:
    """Wait until the reactor has looked at its descriptors again."""
    from twisted.internet import reactor

    turned: Deferred[None] = Deferred()
    reactor.callLater(0, turned.callback, None)
    return turned
