"""One body on its way from a server into a pipe (spec: downloads §4, substitutes §7)."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit, urlunsplit

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.python.failure import Failure

from guixd.errors import FetchError
from guixd.net.codecs import BadData, decoder
from guixd.net.connections import Connections, Exchange, Way, fail_all, request_bytes
from guixd.net.endpoints import basic, refusal
from guixd.net.files import FileReader
from guixd.net.ftp import retrieve
from guixd.net.http1 import ResponseHead
from guixd.net.proxies import Proxies
from guixd.net.reach import FARTHEST, Reach, beyond
from guixd.net.requests import Fetched, Head, Request
from guixd.net.sinks import Sink

REDIRECTS = (301, 302, 303, 307, 308)
PROGRESS = 0.2
"""Seconds between reports."""
_NO_SUCH_PART = 416
_RESUMABLE = ("body", "timeout")
"""Kinds of errors after which a body may go on."""
_LONGEST_TAG = 1024
_BLOCKS_AT_ONCE = 32
"""How many are decoded until others have their turn."""
_SHORT = 64 << 10
"""Bytes of an unwanted body that are quicker taken than a new connection is opened."""


class Body(Exchange):
    """A response whose body goes to a sink.

    :param least: how many bytes must come in IDLE seconds.
    :ivar begun: fires with the head.
    :ivar complete: fires with None.  Either may fail with `FetchError`, but `complete`
        only after `begun` has fired.
    """

    def __init__(self, clock: Any, request: bytes, idle: float, least: int = 0) -> None:
        super().__init__(request)
        self.begun: Deferred[ResponseHead] = Deferred(lambda _: self.abort())
        self.complete: Deferred[None] = Deferred(lambda _: self.abort())
        self.write: Callable[[bytes], None] | None = None
        self._early: list[bytes] = []
        self._clock = clock
        self._idle = idle
        self._least = least
        self._paused = False
        self._since, self._came = clock.seconds(), 0
        self._last = clock.seconds()
        self._timer: IDelayedCall | None = None

    def watch(self) -> None:
        """Begin to watch whether anything comes; to be called when the request is sent."""
        if not self.begun.called:
            self._last = self._clock.seconds()
            self._timer = self._clock.callLater(self._idle, self._look)

    def head(self, head: ResponseHead) -> None:
        self._last = self._since = self._clock.seconds()
        self.pause(True)  # until it is known where the body goes
        if not self.begun.called:
            self.begun.callback(head)

    def flow(self, write: Callable[[bytes], None]) -> None:
        """Let the body go to WRITE."""
        self.write = write
        early, self._early = self._early, []
        for data in early:
            write(data)
        if not self._paused:
            self.pause(False)

    def hold(self, on: bool) -> None:
        """Say whether the sink is full."""
        self._last = self._clock.seconds()
        if self._paused and not on:
            self._since, self._came = self._last, 0
        self._paused = on
        self.pause(on)

    def data(self, data: bytes) -> None:
        self._last = self._clock.seconds()
        self._came += len(data)
        if self.write is None:
            self._early.append(data)
        else:
            self.write(data)

    def end(self) -> None:
        self._stop()
        if not self.complete.called:
            self.complete.callback(None)

    def failed(self, error: FetchError) -> None:
        self._stop()
        which: Deferred[Any] = self.complete if self.begun.called else self.begun
        if not which.called:
            which.errback(error)

    def abort(self) -> None:
        self._stop()
        self.complete.addErrback(lambda _: None)  # Nobody waits for it any more.
        super().abort()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer, now, text = None, self._clock.seconds(), ""
        left = self._last + self._idle - now
        if self._paused:
            left = self._idle
        elif left <= 0:
            text = f"nothing came for {self._idle:g} seconds"
        elif self.begun.called and now - self._since >= self._idle:
            if self._came < self._least:
                text = f"no more than {self._came} bytes came in {self._idle:g} seconds"
            self._since, self._came = now, 0
        if text:
            self.failed(FetchError("timeout", text))
            self.abort()
        else:
            self._timer = self._clock.callLater(left, self._look)


class Transfer:
    """Fetches the body of a `Request` into the pipe SINK.

    A body that breaks off is asked for again from there on, with what is known of it, so that
    nothing of what was decoded and written is lost.

    :param began: called with the `Head` before anything is written, and whenever it goes on.
    :param progress: called with the compressed bytes received, now and then.
    :param source: the descriptor of a file that has the body, so that no server is asked.
    """

    def __init__(
        self,
        reactor: Any,
        connections: Connections,
        proxies: Proxies,
        request: Request,
        sink: int,
        began: Callable[[Head], None],
        progress: Callable[[int], None],
        source: int | None = None,
    ) -> None:
        self._reactor = reactor
        self._connections = connections
        self._proxies = proxies
        self._request = request
        self._began = began
        self._progress = progress
        self._source = source
        self._body: Body | None = None
        self._received = 0
        self._written = 0
        self._ends_there = False
        """Whether the body ends at the limit."""
        self._reported = 0.0
        self._codec = decoder("none")
        self._inputs: deque[bytes] = deque()
        self._blocks: Iterator[bytes] | None = None
        """What is still to come of the input before the others."""
        self._decoded: Deferred[None] = Deferred()
        self._all_came = False
        self._stuffed = False
        self._over = False
        self._sink = Sink(reactor, sink, self._full, self._broken)

    async def run(self) -> Fetched:
        """Fetch; the pipe is closed afterwards.

        :raises FetchError: it cannot be had; parts may have been written.
        """
        try:
            return await self._run()
        except BadData as error:
            raise FetchError("body", str(error)) from None
        finally:
            self._over = True
            if self._body is not None:
                self._body.abort()
            elif self._source is not None:
                os.close(self._source)
            self._sink.close()

    async def _run(self) -> Fetched:
        self._codec = decoder(self._request.compression)
        body, answer, url = await self._answer()
        head = self._head(answer, url)
        self._began(head)
        while (broken := await self._flow(head, body)) is not None:
            body = await self._go_on(head, broken)
        self._all_came = True
        if not self._is_idle:
            await self._decoded
        self._codec.end()
        self._progress(self._received)
        flushed: Deferred[None] = Deferred()
        self._sink.end(lambda: flushed.callback(None))
        await flushed
        return Fetched(head, self._received, self._written)

    async def _flow(self, head: Head, body: Body) -> FetchError | None:
        """Take BODY in; return why it broke off, `None` if it did not.

        :raises FetchError: going on would not help.
        """
        body.flow(self._take)
        try:
            await body.complete
        except FetchError as error:
            if self._over or error.kind not in _RESUMABLE or not self._received:
                raise
            return error
        if head.size is not None and head.offset + self._received < head.size:
            return FetchError("body", "the server sends less than was asked for")
        return None

    async def _go_on(self, head: Head, broken: FetchError) -> Body:
        """Return what is left of a body that has BROKEN off.

        :raises FetchError: it cannot be had.
        """
        offset = head.offset + self._received
        while self._request.resumptions and head.validator:
            left = self._request.resumptions - 1
            self._request = replace(
                self._request, offset=offset, validator=head.validator, resumptions=left
            )
            try:
                body, answer, url = await self._answer()
            except FetchError as error:
                if error.http_status == _NO_SUCH_PART:
                    break
                if error.kind not in _RESUMABLE:
                    raise
                continue
            rest = self._head(answer, url)
            if rest.offset != offset:
                raise FetchError("body", f"{broken.text}, and the server has another file now")
            self._began(rest)
            return body
        raise broken

    @property
    def _is_idle(self) -> bool:
        """Whether all that came is decoded."""
        return self._blocks is None and not self._inputs

    def _take(self, data: bytes) -> None:
        self._received += len(data)
        now = self._reactor.seconds()
        if now - self._reported >= PROGRESS:
            self._reported = now
            self._progress(self._received)
        self._inputs.append(data)
        self._pump()

    def _pump(self) -> None:
        """Decode no more than the sink takes, nor all at once: little may become very much."""
        try:
            for _ in range(_BLOCKS_AT_ONCE):
                if self._stuffed or self._over or self._is_idle:
                    break
                if self._blocks is None:
                    self._blocks = self._codec.feed(self._inputs.popleft())
                block = next(self._blocks, None)
                if block is None:
                    self._blocks = None
                else:
                    self._write(block)
            else:
                self._reactor.callLater(0, self._pump)
        except BadData as error:
            self._fail(FetchError("body", str(error)))
        if self._over or self._body is None:
            return
        self._body.hold(self._stuffed or not self._is_idle)
        if self._all_came and self._is_idle and not self._decoded.called:
            self._decoded.callback(None)

    def _write(self, block: bytes) -> None:
        self._written += len(block)
        limit = self._request.limit
        if limit is not None and self._written > limit:
            self._fail(FetchError("limit", f"more than {limit} bytes came"))
        else:
            self._sink.write(block)
            if self._written == limit and self._ends_there and self._body is not None:
                self._body.end()

    def _full(self, on: bool) -> None:
        self._stuffed = on
        if not on:
            self._pump()

    def _broken(self) -> None:
        self._fail(FetchError("fetcher", "the data is no longer wanted"))

    def _fail(self, error: FetchError) -> None:
        self._over = True
        body = self._body
        if body is not None and not body.complete.called:
            body.failed(error)
            body.abort()
        elif self._all_came and not self._decoded.called:
            self._decoded.errback(error)

    # --- to the answer that has the body ------------------------------------------

    async def _answer(self) -> tuple[Body, ResponseHead, str]:
        """Return the response with the body, and its URL."""
        request = self._request
        url = request.url
        if self._source is not None:
            body = self._body = Body(self._reactor, b"", request.idle_timeout)
            body.watch()
            FileReader(self._reactor, self._source, body)
            return body, await body.begun, url
        user, nearest = urlsplit(url), Reach(request.nearest)
        for redirections in range(request.redirects + 1):
            parts = split_url(url, request.schemes)
            try:
                if parts.scheme == "ftp":
                    body, answer = await self._get_by_ftp(parts, nearest)
                    return body, answer, without_user(parts)
                way = Way.to(parts, self._proxies.proxy_for(url), request.verify, nearest)
                body, answer = await self._get(way, parts, self._fields(way, parts, user))
            except FetchError as error:
                if error.kind == "address" and redirections:
                    raise FetchError("redirect", f"redirected, but {error.text}") from None
                raise
            bare = without_user(parts)
            if answer.status not in REDIRECTS or request.method != "GET":
                self._check_status(answer, way)
                return body, answer, bare
            location = answer.get("location")
            await _dismiss(body, answer)
            if not location:
                raise FetchError("redirect", f"redirected to nowhere ({answer.status})")
            target = joined(bare, location)
            try:
                split_url(target, request.schemes)
            except FetchError as error:
                raise FetchError("redirect", f"redirected, but {error.text}") from None
            url = target
            nearest = max(nearest, min(body.reach, FARTHEST))
        raise FetchError("redirect", f"more than {request.redirects} redirections")

    def _fields(self, way: Way, parts: SplitResult, user: SplitResult) -> dict[str, str]:
        request = self._request
        fields = dict(request.headers)
        if request.offset:
            fields["Range"] = f"bytes={request.offset}-"
            if request.validator:
                fields["If-Range"] = request.validator
        credentials = parts if parts.username is not None else None
        if user.username is not None and _origin(parts) == _origin(user):
            credentials = user
        if credentials is not None:
            if way.scheme == "https" and not way.verify:
                raise FetchError(
                    "credentials", "no password is sent to a server whose certificate is not right"
                )
            name, password = credentials.username or "", credentials.password or ""
            fields["Authorization"] = basic(f"{unquote(name)}:{unquote(password)}")
        return fields

    async def _get(
        self, way: Way, parts: SplitResult, fields: dict[str, str]
    ) -> tuple[Body, ResponseHead]:
        """Return a response; a connection that was kept too long is given up for a new one."""
        request = request_bytes(way, parts, fields, self._request.method)
        while True:
            body = self._body = self._new_body(request)
            kept = self._connections.take(way)
            try:
                if kept is None:
                    connection = await self._connections.open(
                        way, self._request.connect_timeout, fail_all
                    )
                else:
                    connection = kept
                connection.send(body)
                body.watch()
                return body, await body.begun
            except FetchError as error:
                body.abort()
                if kept is None or body.began or error.kind == "timeout":
                    raise
            except BaseException:
                body.abort()
                raise

    async def _get_by_ftp(self, parts: SplitResult, nearest: Reach) -> tuple[Body, ResponseHead]:
        body = self._body = self._new_body(b"")
        timeout = self._request.connect_timeout
        running = Deferred.fromCoroutine(
            retrieve(
                beyond(self._reactor, nearest), parts, body, timeout=timeout, started=body.watch
            )
        )

        def failed(failure: Failure) -> None:
            error: Any = failure.value
            if not isinstance(error, CancelledError):
                text = f"{type(error).__name__}: {error}"
                body.failed(error if isinstance(error, FetchError) else FetchError("body", text))

        running.addErrback(failed)
        try:
            return body, await body.begun
        except BaseException:
            running.cancel()
            raise

    def _new_body(self, request: bytes) -> Body:
        return Body(self._reactor, request, self._request.idle_timeout, self._request.least)

    def _check_status(self, answer: ResponseHead, way: Way) -> None:
        if answer.status == 200 or (answer.status == 206 and self._request.offset):
            return
        if answer.status == 407 and way.proxy is not None:
            text = f"the proxy {way.proxy.name} {refusal(answer.status, answer.phrase)}"
            raise FetchError("proxy", text, answer.status)
        through = f", through the proxy {way.proxy.name}" if way.proxy is not None else ""
        text = f"the server answers {answer.status} {answer.phrase}".rstrip() + through
        raise FetchError("http", text, answer.status)

    def _head(self, answer: ResponseHead, url: str) -> Head:
        offset, size = 0, answer.size
        endless = size is None and not answer.get("transfer-encoding")
        self._ends_there = endless and self._request.exact
        if answer.status == 206:
            words = answer.get("content-range").replace("/", " ").replace("-", " ").split()
            if len(words) != 4 or words[0] != "bytes" or words[1] != str(self._request.offset):
                raise FetchError("body", "the server sends another part than was asked for")
            offset = self._request.offset
            if size is not None:
                size += offset
            elif words[3].isascii() and words[3].isdigit() and len(words[3]) < 16:
                size = int(words[3])
        tag = answer.get("etag")
        validator = tag if tag.startswith('"') else answer.get("last-modified")
        return Head(url, size, offset, validator if len(validator) <= _LONGEST_TAG else "")


async def _dismiss(body: Body, answer: ResponseHead) -> None:
    """Be done with a response whose body nobody wants; the connection is kept if that is cheap."""
    if answer.size is not None and answer.size <= _SHORT:
        body.flow(lambda data: None)
        try:
            await body.complete
        except FetchError:
            pass
    else:
        body.abort()


def split_url(url: str, schemes: Any) -> SplitResult:
    """Split URL into its parts.

    :raises FetchError: it cannot be fetched (kind `url`).
    """
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        raise FetchError("url", "the URL is not well-formed") from None
    if parts.scheme not in schemes:
        raise FetchError("url", f"URLs of type '{parts.scheme}' are not fetched")
    if not host or any(character <= " " or character == "\x7f" for character in url):
        raise FetchError("url", "the URL is not well-formed")
    return parts


def joined(base: str, location: str) -> str:
    """Return the URL that LOCATION, seen from BASE, is; empty if it is none.

    Some servers write the bytes of file names as they are.
    """
    location = re.sub("[ \x80-\xff]", lambda byte: f"%{ord(byte[0]):02X}", location)
    try:
        return urljoin(base, location)
    except ValueError:
        return ""


def without_user(parts: SplitResult) -> str:
    """Return the URL of PARTS without user information and fragment."""
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, parts.query, ""))


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port
