"""Connections to HTTP servers: kept open, shared, and with several requests on the way."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import SplitResult, quote

from OpenSSL import SSL
from twisted.internet.defer import CancelledError
from twisted.internet.defer import TimeoutError as TookTooLong
from twisted.internet.error import ConnectError, ConnectionLost, DNSLookupError
from twisted.internet.error import TimeoutError as ConnectTimeout
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from guixd.errors import FetchError
from guixd.net.endpoints import basic, bracketed, endpoint_for
from guixd.net.http1 import BadResponse, ResponseHead, ResponseReader
from guixd.net.proxies import Proxy
from guixd.net.reach import Reach, check, reach_of, reach_of_host
from guixd.net.requests import AGENT

KEPT = 32
"""Most idle connections to one server."""
KEPT_FOR = 30.0
"""Seconds until an idle connection is closed."""
_ADDRESSES = 4
"""How many times the timeout for one address a whole connection may take."""
_READ_AT_ONCE = 256 << 10
_CHUNKS_AT_ONCE = 32 << 10
"""The same where small chunks may take long: others wait meanwhile."""
_SAFE = "%/:?#[]@!$&'()*+,;=~"
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Way:
    """A server, and how it is reached: what connections are shared by."""

    scheme: str
    host: str
    port: int
    proxy: Proxy | None
    verify: bool
    nearest: Reach = Reach.LOOPBACK
    """What the server must not be nearer than."""

    @classmethod
    def to(
        cls,
        parts: SplitResult,
        proxy: Proxy | None,
        verify: bool,
        nearest: Reach = Reach.LOOPBACK,
    ) -> Way:
        """Return the way to the server of a URL.

        :raises FetchError: even its name says that it is nearer than NEAREST, or is none.
        """
        host = _ascii(parts.hostname or "")
        check(reach_of_host(host), nearest, host)  # a proxy would not
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
        return cls(parts.scheme, host, port, proxy, verify, nearest)


def request_bytes(
    way: Way, parts: SplitResult, fields: dict[str, str], method: str = "GET"
) -> bytes:
    """Return a request without a body for the URL PARTS."""
    target = quote(parts.path or "/", safe=_SAFE)
    if parts.query:
        target += "?" + quote(parts.query, safe=_SAFE)
    host = bracketed(way.host)
    if way.port != _DEFAULT_PORTS[way.scheme]:
        host += f":{way.port}"
    all_fields = {"Host": host, "User-Agent": AGENT, "Accept": "*/*", **fields}
    if way.proxy is not None and way.scheme == "http":
        target = f"http://{host}{target}"
        if way.proxy.credentials:
            all_fields["Proxy-Authorization"] = basic(way.proxy.credentials)
    if method != "GET":
        all_fields["Content-Length"] = "0"
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in all_fields.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _ascii(host: str) -> str:
    """Return HOST as servers of names know it, which those that look names up want it to be."""
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        raise FetchError("url", f"{host} cannot be the name of a server") from None


class Exchange:
    """One request and its response, for children that want to be told.

    :ivar began: whether anything of the response has come.
    :ivar reach: how near the server is that it was sent to.
    """

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.began = False
        self.reach = Reach.WORLD
        self.connection: Connection | None = None

    def head(self, head: ResponseHead) -> None:
        """The response begins."""

    def data(self, data: bytes) -> None:
        """Some of its body came."""

    def end(self) -> None:
        """It is complete."""

    def failed(self, error: FetchError) -> None:
        """It will never be complete."""

    def pause(self, on: bool) -> None:
        """Stop or resume reading from the connection."""
        if self.connection is not None:
            self.connection.pause(on)

    def abort(self) -> None:
        """Be done with it, and with its connection."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()


Lost: TypeAlias = Callable[["Connection", list[Exchange], FetchError], None]


class Connection(Protocol):
    """A connection with the exchanges on it, which are answered in turn.

    :param idle: called when all are answered and it may be used again.
    :ivar answered: how many exchanges have ended.
    :ivar received: how many bytes have come.
    :ivar reach: how near the server is, as far as that is known.
    :param lost: called at its end with the exchanges of which nothing has come, and why.
    """

    transport: Any
    _socket: Any

    def __init__(
        self,
        idle: Callable[[Connection], None],
        lost: Lost,
    ) -> None:
        self._idle = idle
        self._lost = lost
        self._exchanges: deque[Exchange] = deque()
        self._reader = ResponseReader(self)
        self._persistent = True
        self._paused = False
        self.low = 0
        self.answered = 0
        self.received = 0
        self.reach = Reach.WORLD
        self.alive = True
        self.timer: IDelayedCall | None = None

    def connectionMade(self) -> None:
        below: Any = self.transport
        while hasattr(below, "wrappedProtocol"):
            below = below.transport
        below.bufferSize = _READ_AT_ONCE
        below.setTcpNoDelay(True)
        self._socket = below
        self.reach = reach_of(self.transport.getPeer().host)

    @property
    def waiting(self) -> int:
        """How many exchanges have not ended."""
        return len(self._exchanges)

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self.alive and self._persistent and (bool(self._exchanges) or self._reader.idle)

    def adopt(self, idle: Callable[[Connection], None], lost: Lost, low: int = 0) -> None:
        """Tell others from now on; IDLE already when LOW exchanges have not ended."""
        self._idle, self._lost = idle, lost
        self.low = low

    def send(self, exchange: Exchange) -> None:
        """Send a request."""
        self.send_all([exchange])

    def send_all(self, exchanges: list[Exchange]) -> None:
        """Send requests at once."""
        for exchange in exchanges:
            exchange.connection = self
            exchange.reach = self.reach
            self._exchanges.append(exchange)
        self.transport.write(b"".join(exchange.request for exchange in exchanges))

    def pause(self, on: bool) -> None:
        """Stop or resume reading."""
        if on != self._paused and self.alive:
            self._paused = on
            (self.transport.pauseProducing if on else self.transport.resumeProducing)()

    def abort(self) -> None:
        """Close it at once."""
        self._persistent = False
        if self.alive:
            self.transport.abortConnection()

    def dataReceived(self, data: bytes) -> None:
        if not self._exchanges:
            self.abort()  # Nobody has asked.
            return
        self.received += len(data)
        try:
            self._reader.feed(data)
        except BadResponse as error:
            self._fail(FetchError("body", str(error)))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.alive = False
        orderly = True
        if self._exchanges:
            reset = isinstance(reason.value, ConnectionLost)  # which ends no body
            orderly = self._reader.idle if reset else self._reader.closed()
        error = explained(reason)
        unanswered = []
        while self._exchanges:
            exchange = self._exchanges.popleft()
            exchange.connection = None
            if exchange.began or not orderly:
                exchange.failed(error)
                orderly = True
            else:
                unanswered.append(exchange)
        self._lost(self, unanswered, error)

    def _fail(self, error: FetchError) -> None:
        self.alive = self._persistent = False
        self.transport.abortConnection()
        if self._exchanges:
            exchange = self._exchanges.popleft()
            exchange.connection = None
            exchange.failed(error)

    # What the reader tells.

    def head(self, head: ResponseHead) -> None:
        if not self._exchanges:
            raise BadResponse("an answer came that nobody asked for")
        self._persistent = head.persistent and self._persistent
        chunked = bool(head.get("transfer-encoding"))
        self._socket.bufferSize = _CHUNKS_AT_ONCE if chunked else _READ_AT_ONCE
        self._exchanges[0].began = True
        self._exchanges[0].head(head)

    def data(self, data: bytes) -> None:
        if self._exchanges:
            self._exchanges[0].data(data)

    def end(self) -> None:
        exchange = self._exchanges.popleft()
        exchange.connection = None
        self.answered += 1
        self.pause(False)
        # First, as who is told may want to ask the same server something else.
        if not self._persistent:
            if self.alive:
                self.transport.abortConnection()
        elif len(self._exchanges) <= self.low and self.alive:
            self._idle(self)
        exchange.end()


class Connections:
    """All connections of the fetcher.

    :param trust: returns the certificates that are trusted.
    """

    def __init__(self, reactor: Any, trust: Callable[[], Any]) -> None:
        self._reactor = reactor
        self._trust = trust
        self._kept: dict[Way, list[Connection]] = {}

    def take(self, way: Way) -> Connection | None:
        """Return an open connection that nobody uses, if there is one."""
        kept = self._kept.get(way, [])
        while kept:
            connection = kept.pop()
            if connection.timer is not None:
                connection.timer.cancel()
                connection.timer = None
            if connection.usable:
                return connection
        return None

    async def open(
        self,
        way: Way,
        timeout: float,
        lost: Lost,
        idle: Callable[[Connection], None] | None = None,
    ) -> Connection:
        """Return a new connection.

        :param timeout: seconds for each address.
        :param lost: see `Connection`.
        :param idle: likewise; by default it is kept for the next.
        :raises FetchError: there is none.
        """
        try:
            endpoint = endpoint_for(
                self._reactor,
                way.host,
                way.port,
                tls=way.scheme == "https",
                proxy=way.proxy,
                trust=self._trust if way.verify else None,
                timeout=timeout,
                nearest=way.nearest,
            )
            connection = Connection(idle or (lambda each: self.keep(way, each)), lost)
            connecting = endpoint.connect(Factory.forProtocol(lambda: connection))
            await connecting.addTimeout(timeout * _ADDRESSES, self._reactor)
        except (FetchError, CancelledError):
            raise
        except Exception as error:  # noqa: BLE001
            raise explained(Failure(error), connecting=True) from None  # type: ignore[no-untyped-call]
        if way.proxy is not None:
            connection.reach = reach_of_host(way.host)
        return connection

    def keep(self, way: Way, connection: Connection) -> None:
        """Keep an idle connection for the next."""
        connection.adopt(lambda each: self.keep(way, each), fail_all)
        kept = self._kept.setdefault(way, [])
        if len(kept) >= KEPT or connection in kept:
            if connection not in kept:
                connection.abort()
            return
        kept.append(connection)

        def close() -> None:
            connection.timer = None
            kept.remove(connection)
            connection.abort()

        connection.timer = self._reactor.callLater(KEPT_FOR, close)

    def close(self) -> None:
        """Close all that nobody uses."""
        for kept in self._kept.values():
            for connection in kept:
                if connection.timer is not None:
                    connection.timer.cancel()
                connection.abort()
            kept.clear()


def fail_all(connection: Connection, exchanges: list[Exchange], error: FetchError) -> None:
    """Let all EXCHANGES fail with ERROR, for which their CONNECTION was lost."""
    for exchange in exchanges:
        exchange.failed(error)


def explained(reason: Failure, *, connecting: bool = False) -> FetchError:
    """Return what the user reads of REASON, why a connection ended or did not begin."""
    error: Any = reason.value
    if isinstance(error, FetchError):
        return error
    if isinstance(error, DNSLookupError):
        return FetchError("dns", f"the server's name is not known: {error}")
    if isinstance(error, ConnectTimeout | TookTooLong):
        return FetchError("connect", "no connection: the server does not answer")
    if isinstance(error, ConnectError):
        number = error.osError
        why = os.strerror(number).lower() if isinstance(number, int) else error
        return FetchError("connect", f"no connection: {why}")
    if isinstance(error, SSL.Error) or type(error).__module__.startswith("service_identity"):
        return FetchError("tls", f"TLS: {_tls_text(error)}")
    if connecting:
        return FetchError("connect", f"no connection: {error}")
    return FetchError("body", "the connection was closed before the answer was complete")


def _tls_text(error: Any) -> str:
    if not isinstance(error, SSL.Error):
        return "the certificate is for another host"
    details = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return ", ".join(str(entry[-1]) for entry in details) or type(error).__name__
