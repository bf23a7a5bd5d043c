"""Servers that do exactly what a test says, on loopback."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredQueue, maybeDeferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from guixd.errors import FetchError
from guixd.net.client import Fetcher
from guixd.net.receiving import receive
from guixd.net.requests import Fetched, Head, Request


class Asked(Protocol):
    """One connection: each request goes to the server's script.

    :ivar requests: the heads of all requests that came, as text.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.requests: list[str] = []
        self.closed: Deferred[None] = Deferred()
        self._buffer = b""

    def connectionMade(self) -> None:
        self.server.connections.append(self)

    def dataReceived(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            text = head.decode("latin-1")
            self.requests.append(text)
            self.server.requests.append(text)
            self.server.arrivals.put(self)
            self.server.script(self, text)

    def send(self, data: bytes) -> None:
        self.transport.write(data)

    def close(self) -> None:
        self.transport.loseConnection()

    def reset(self) -> None:
        self.transport.abortConnection()

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.closed.callback(None)


class Server(Factory):
    """A server on a port of its own.

    :param script: called with the connection and the text of each request's head.
    :param interface: the address, of which Linux has many on its loopback.
    :ivar requests: all that came.
    :ivar arrivals: the connection of each, to be waited for with `get`.
    """

    def __init__(
        self,
        case: TestCase,
        script: Callable[[Asked, str], None],
        interface: str = "127.0.0.1",
    ) -> None:
        self.script = script
        self.requests: list[str] = []
        self.connections: list[Asked] = []
        self.arrivals: DeferredQueue[Asked] = DeferredQueue()
        self.interface = interface
        port = reactor.listenTCP(0, self, interface=interface)
        self.number = port.getHost().port
        case.addCleanup(self._stop, port)

    async def _close(self, port: Any) -> None:
        await port.stopListening()
        for connection in self.connections:
            if connection.transport.connected:
                connection.reset()
                await connection.closed

    def _stop(self, port: Any) -> Deferred[None]:
        return Deferred.fromCoroutine(self._close(port))

    def buildProtocol(self, addr: object) -> Asked:
        return Asked(self)

    def url(self, path: str = "/file", user: str = "") -> str:
        return f"http://{user}{self.interface}:{self.number}{path}"


def answer(
    body: bytes = b"", status: str = "200 OK", length: int | None = None, **fields: str
) -> bytes:
    """Return a whole response; FIELDS have `_` in place of `-`."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def always(response: bytes) -> Callable[[Asked, str], None]:
    """Return a script that answers RESPONSE to everything."""
    return lambda connection, _: connection.send(response)


def in_pieces(
    content: bytes, size: int, breaks: Callable[[Asked], object], **fields: str
) -> Callable[[Asked, str], None]:
    """Return a script that sends SIZE bytes, from where the request says, and then BREAKS off."""

    def script(connection: Asked, request: str) -> None:
        begin = int(request.partition("bytes=")[2].partition("-")[0] or 0)
        rest, status = content[begin:], "206 Partial Content" if begin else "200 OK"
        where = {"Content_Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        told = {**fields, **(where if begin else {})}
        connection.send(answer(rest[:size], status=status, length=len(rest), **told))
        if len(rest) > size:
            breaks(connection)

    return script


def drip(connection: Asked) -> None:
    """Send a byte now and then, until the other side hangs up."""

    dripping = LoopingCall(connection.send, b"x")
    dripping.start(0.02)
    connection.closed.addCallback(lambda _: dripping.stop())


def unused_port() -> int:
    """Return a port that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FetcherCase(TestCase):
    """A test with a fetcher of its own."""

    timeout = 30
    environ: dict[str, str] = {}

    def setUp(self) -> None:
        self.fetcher = self.make_fetcher(self.environ)

    def make_fetcher(self, environ: dict[str, str]) -> Fetcher:
        fetcher = Fetcher(reactor, environ)
        self.addCleanup(fetcher.stop)
        return fetcher

    async def fetch(self, url: str, *, fetcher: Any = None, **fields: Any) -> tuple[bytes, Fetched]:
        """Fetch URL; return its body and the result, or raise."""
        blocks: list[bytes] = []
        self.heads: list[Head] = []
        fetched = await receive(
            reactor,
            _inline,
            fetcher or self.fetcher,
            Request(url, **fields),
            blocks.append,
            head=self.heads.append,
        )
        return b"".join(blocks), fetched

    async def refused(self, url: str, **fields: Any) -> Any:
        """Return the `FetchError` that fetching URL ends with."""
        try:
            await self.fetch(url, **fields)
        except FetchError as error:
            return error
        raise AssertionError("did not fail")


def _inline(function: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
    return maybeDeferred(function, *arguments)
