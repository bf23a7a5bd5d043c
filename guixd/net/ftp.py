"""Fetching by FTP: anonymous or with a password, passive, binary (RFC 959, 2428)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from typing import Protocol as Shape
from urllib.parse import SplitResult, unquote

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure

from guixd.errors import FetchError
from guixd.net.connections import explained
from guixd.net.http1 import ResponseHead

_EXTENDED = re.compile(r"\(\|\|\|([0-9]{1,5})\|\)")
_PASSIVE = re.compile(r"([0-9]{1,3},){4}([0-9]{1,3}),([0-9]{1,3})")
_LONGEST_LINE = 4096
_MOST_LINES = 1000
"""Of one reply."""


class Receiver(Shape):
    """Who gets the file: an exchange as for HTTP."""

    connection: Any

    def head(self, head: ResponseHead) -> None: ...
    def data(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def failed(self, error: FetchError) -> None: ...


class _Control(LineReceiver):
    """The connection for commands, of which one at a time waits for its reply."""

    delimiter = b"\n"
    MAX_LENGTH = _LONGEST_LINE
    transport: Any

    def __init__(self) -> None:
        self._waiting: Deferred[tuple[int, str]] | None = None
        self._replies: list[tuple[int, str]] = []
        self._lines = 0
        self._lost = False

    def reply(self) -> Deferred[tuple[int, str]]:
        """Return the code and the text of the next reply."""
        self._waiting = waiting = Deferred[tuple[int, str]]()
        if self._replies:
            self._answer(*self._replies.pop(0))
        elif self._lost:
            self.connectionLost()
        return waiting

    async def command(self, text: str, *good: int) -> tuple[int, str]:
        """Send TEXT; return the reply, whose code is one of GOOD."""
        self.sendLine(text.encode() + b"\r")  # type: ignore[no-untyped-call]
        return _checked(await self.reply(), *good)

    def lineReceived(self, line: bytes) -> None:
        text = line.decode("latin-1").rstrip("\r")
        self._lines += 1
        if self._lines > _MOST_LINES:
            self.transport.abortConnection()
        elif re.match(r"[1-5][0-9]{2} ", text + " ") and text[3:4] != "-":
            self._lines = 0
            self._answer(int(text[:3]), text[4:])

    def lineLengthExceeded(self, line: bytes) -> None:
        self.transport.abortConnection()

    def _answer(self, code: int, text: str) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            self._replies.append((code, text))
        elif not waiting.called:
            waiting.callback((code, text))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._lost = True
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.called:
            waiting.errback(FetchError("body", "the FTP server closed the connection"))


class _Data(Protocol):
    """The connection that the file comes over; to the exchange it is like one of HTTP."""

    transport: Any

    def __init__(self, body: Receiver, control: _Control) -> None:
        self._body = body
        self._control = control
        self._held = True
        self.closed: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self.transport.pauseProducing()

    def pause(self, on: bool) -> None:
        """Stop or resume reading."""
        if not self.closed.called:
            (self.transport.pauseProducing if on else self.transport.resumeProducing)()

    def abort(self) -> None:
        """Close both connections."""
        self.transport.abortConnection()
        self._control.transport.abortConnection()

    def dataReceived(self, data: bytes) -> None:
        self._body.data(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.closed.callback(None)


async def retrieve(
    reactor: Any,
    parts: SplitResult,
    body: Receiver,
    *,
    timeout: float,
    started: Callable[[], None],
) -> None:
    """Let BODY have the file of the URL PARTS.

    :param timeout: seconds for each address.
    :param started: called when the server has been asked for it.
    :raises FetchError: the server does not give it.
    """
    path = _harmless(parts.path).lstrip("/")
    user = _harmless(parts.username or "anonymous")
    password = _harmless(parts.password or "anonymous@")
    host, control = parts.hostname or "", _Control()
    await _connect(reactor, host, parts.port or 21, control, timeout)
    data: _Data | None = None
    try:
        started()
        _checked(await control.reply(), 220)
        code, _ = await control.command(f"USER {user}", 230, 331)
        if code == 331:
            await control.command(f"PASS {password}", 230, 202)
        await control.command("TYPE I", 200)
        code, text = await control.command(f"SIZE {path}")
        size = int(text) if code == 213 and re.fullmatch("[0-9]{1,15}", text) else None
        data = _Data(body, control)
        host = control.transport.getPeer().host  # the name may mean another by now
        await _connect(reactor, host, await _passive_port(control), data, timeout)
        await control.command(f"RETR {path}", 125, 150)
    except BaseException:
        control.transport.abortConnection()
        if data is not None and data.transport is not None:
            data.transport.abortConnection()
        raise
    Deferred.fromCoroutine(_finish(control, data, body))
    body.connection = data
    body.head(ResponseHead(200, "", {}, size, False))


async def _finish(control: _Control, data: _Data, body: Receiver) -> None:
    """Tell BODY how it ended: only the server knows whether the file was complete."""
    await data.closed
    body.connection = None
    try:
        _checked(await control.reply(), 226, 250)
    except FetchError as error:
        body.failed(FetchError("body", error.text))
    else:
        body.end()
    control.transport.abortConnection()


async def _passive_port(control: _Control) -> int:
    """Return where the server sends the file from; its address is that of the server."""
    code, text = await control.command("EPSV")
    match = _EXTENDED.search(text)
    if code == 229 and match is not None:
        return int(match[1])
    _, text = await control.command("PASV", 227)
    match = _PASSIVE.search(text)
    if match is None:
        raise FetchError("body", "the FTP server gives no port")
    return int(match[2]) * 256 + int(match[3])


async def _connect(reactor: Any, host: str, port: int, protocol: Any, timeout: float) -> None:
    endpoint: Any = HostnameEndpoint(reactor, host, port, timeout=timeout)
    try:
        await endpoint.connect(Factory.forProtocol(lambda: protocol))
    except CancelledError:
        raise
    except Exception as error:  # noqa: BLE001
        raise explained(Failure(error), connecting=True) from None  # type: ignore[no-untyped-call]


def _checked(reply: tuple[int, str], *good: int) -> tuple[int, str]:
    if good and reply[0] not in good:
        raise FetchError("http", f"the FTP server answers {reply[0]} {reply[1]}", reply[0])
    return reply


def _harmless(text: str) -> str:
    """Return TEXT without its percent signs, if it can be in a command."""
    plain = unquote(text)
    if any(character < " " or character == "\x7f" for character in plain):
        raise FetchError("url", "the URL is not well-formed")
    return plain
