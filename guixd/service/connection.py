"""The daemon's end of one accepted socket (spec: protocol §1, §3, §4, §8).

Not a Twisted transport but a descriptor of its own: everything that a read
brings is decoded at once and answered by one `send`; only what the socket does
not take is queued.  The meaning of requests is the business of a `Session`.
"""

from __future__ import annotations

import socket as sockets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeAlias

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from guixd.errors import GuixdError, ProtocolError
from guixd.formats.messages import (
    LAST,
    Greeting,
    NotAClient,
    ServerHandshake,
    encode_error,
    encode_next,
)
from guixd.formats.operations import CollectGarbage, Operation, Requests
from guixd.formats.path import StoreDirectory
from guixd.formats.wire import MORE, Data, Source
from guixd.service.contract import Peer as Peer
from guixd.service.contract import Session, State, StreamConsumer, peer_credentials
from guixd.service.hangup import HangupWatch

_log = Logger()

Reactor: TypeAlias = Any
"""A reactor that is both `IReactorFDSet` and `IReactorTime`."""

EARLY_INPUT: Final = 64 * 1024
"""Most bytes kept of what a client sends while its last request is served."""
HIGH_WATER: Final = 256 * 1024
"""More bytes than this waiting for a slow reader pause whoever makes them."""
LOW_WATER: Final = 64 * 1024
STREAM_BLOCK: Final = 512 * 1024
REQUESTS_PER_TURN: Final = 64
ASK_AGAIN: Final = 8
"""How often a socket without input is tried before the reactor waits for it."""
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 64 * 1024 * 1024

_served_last = 0  # the id of a connection
# Every read lands here first; what is not used up is copied before the next.
_BUFFER: Final = bytearray(256 * 1024)
_REMOTE_REFUSES: Final = {
    CollectGarbage.opcode: "garbage collection is not allowed for clients that connect by TCP"
}

SessionFactory: TypeAlias = "Callable[[Connection, Greeting], Session | Awaitable[Session]]"

_GREETING, _READY, _WORKING, _STREAMING, _LINGERING, _CLOSING, _CLOSED = State


@implementer(IReadWriteDescriptor)
class Connection:
    """One client.

    :ivar peer: who it is, None for TCP.
    :ivar minor: the client's minor version, for replies that depend on it.
    :ivar pending: bytes that wait for the client to read.
    """

    __slots__ = (
        "_closed", "_consumer", "_drained", "_factory", "_handle",
        "_handshake", "_linger_left", "_linger_timer", "_out", "_paused", "_processing", "_quiet",
        "_reactor", "_reading", "_requests", "_scheduled", "_sent", "_session", "_slow",
        "_socket", "_source", "_state", "_watch", "_work", "_writing", "minor", "peer", "pending",
    )  # fmt: skip

    def __init__(
        self,
        reactor: Reactor,
        socket: sockets.socket,
        session_factory: SessionFactory,
        *,
        store: StoreDirectory,
        closed: Callable[[Connection], None] | None = None,
    ) -> None:
        """Serve SOCKET, which is connected; `start` begins.

        :param session_factory: called after the greeting; its failure ends the connection.
        :param closed: called once at the end, after `Session.disconnected`.
        """
        socket.setblocking(False)
        if socket.family in (sockets.AF_INET, sockets.AF_INET6):
            socket.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
        self._reactor = reactor
        self._socket = socket
        self._factory = session_factory
        self._closed = closed
        self.peer = peer_credentials(socket)
        self.minor = 0
        self.pending = 0
        self._source = Source(store)
        self._handshake: ServerHandshake | None = ServerHandshake()
        self._requests: Requests | None = None
        self._session: Session | None = None
        self._handle: Callable[[Operation[Any]], bytes | Awaitable[bytes]] | None = None
        self._state = _GREETING
        self._work: Deferred[Any] | None = None
        self._consumer: StreamConsumer | None = None
        self._out: list[Data] = []
        self._sent = 0
        self._drained: list[Deferred[None]] = []
        self._reading = self._writing = False
        self._processing = self._scheduled = self._slow = self._paused = self._quiet = False
        self._watch: HangupWatch | None = None
        self._linger_timer: Any = None
        self._linger_left = LINGER_BYTES

    def start(self) -> None:
        """Begin to serve."""
        self._update_reading()

    # What sessions use.

    def next(self, data: Data) -> None:
        """Send DATA as log text."""
        self._send(encode_next(data))

    def send(self, messages: bytes) -> None:
        """Send READ or WRITE MESSAGES, encoded."""
        self._send(messages)

    async def drained(self) -> None:
        """Wait until less than `LOW_WATER` bytes are pending; at once if it is so."""
        if self.pending > LOW_WATER:
            waiting: Deferred[None] = Deferred(self._forget_drained)
            self._drained.append(waiting)
            await waiting

    def take_over(self, consumer: StreamConsumer) -> None:
        """Give all further bytes of the client to CONSUMER until `give_back`.

        What has been received already comes first, before this returns.  Only
        for use in `Session.handle` or the work that it began.
        """
        if self._state is not _WORKING:
            raise CancelledError
        self._consumer = consumer
        self._paused = False
        self._state = _STREAMING
        buffered = self._source.rest()
        if buffered:
            consumer.received(buffered)
        self._update_reading()

    def pause(self) -> None:
        """Receive nothing more for the consumer, for now."""
        self._paused = True
        self._update_reading()

    def resume(self) -> None:
        """Receive again."""
        self._paused = False
        self._update_reading()

    def give_back(self, rest: Data) -> None:
        """End the consumer's turn; REST is what it got but did not need."""
        if self._state is not _STREAMING:
            return
        self._consumer = None
        self._state = _WORKING
        self._source.feed(bytes(rest))
        self._update_reading()

    def abort(self) -> None:
        """Disconnect at once, cancelling the work; `closed` is called when it is over."""
        self._close()

    def give_up(self) -> None:
        """Cancel the work, if there is any; the client is told that it failed."""
        if self._work is not None:
            self._work.cancel()

    def was_idle(self) -> bool:
        """Whether there has been no request since this was asked last."""
        idle = self._quiet and self._state in (_READY, _GREETING) and not self._out
        self._quiet = True
        return idle

    # What the reactor calls.

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 after the end."""
        return self._socket.fileno()

    def logPrefix(self) -> str:
        """Name this in logs."""
        return "guixd"

    def doRead(self) -> None:
        """Receive once, and serve what has come."""
        state = self._state
        if state is _STREAMING:
            self._read_stream()
            return
        if self._scheduled:
            return
        # A client that waits for each reply before it asks again is back sooner than
        # the reactor could wait for it.  Not when there are others to serve.
        global _served_last
        alone, _served_last = _served_last == id(self), id(self)
        left = REQUESTS_PER_TURN if alone else 1
        while left and self._receive(ASK_AGAIN if alone else 1):
            left -= 1

    def _receive(self, tries: int) -> bool:
        """Receive something in TRIES, and serve it; whether more may come soon."""
        state = self._state
        room = len(_BUFFER) if state is not _WORKING else EARLY_INPUT - len(self._source)
        while True:
            try:
                size = self._socket.recv_into(_BUFFER, max(room, 1))
                break
            except (BlockingIOError, InterruptedError):
                tries -= 1
                if not tries:
                    return False
            except OSError:
                self._close()
                return False
        self._quiet = False
        if not size:
            self._end_of_input()
        elif state is _LINGERING:
            self._linger_left -= size
            if self._linger_left < 0:
                self._close()
        else:
            self._source.feed(_BUFFER, size)
            try:
                self._process()
            finally:
                self._source.settle()
            return self._state is _READY and not self._out and not self._scheduled
        return False

    def doWrite(self) -> None:
        """Send what is queued."""
        self._flush()
        if self.pending <= LOW_WATER and self._state is _READY:
            self._process()

    def connectionLost(self, reason: Failure) -> None:
        """The reactor saw the socket fail."""
        self._close()

    # Input.

    def _read_stream(self) -> None:
        if self._paused:
            return
        try:
            data = self._socket.recv(STREAM_BLOCK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._end_of_input()
        elif self._consumer is not None:
            try:
                self._consumer.received(data)
            except Exception:  # noqa: BLE001
                _log.failure("consumer of a client's stream failed")
                self._close()

    def _end_of_input(self) -> None:
        if self._state is _READY:
            self._state = _CLOSING
            self._update_reading()
            self._flush()
        else:
            self._close()

    def _process(self) -> None:
        """Serve what the buffer has, until something takes time or bytes are missing."""
        if self._processing or self._scheduled:
            return
        self._processing = True
        left = REQUESTS_PER_TURN
        while True:
            try:
                state = self._state
                if state is _READY:
                    if self.pending > HIGH_WATER:
                        self._flush()
                        if self.pending > LOW_WATER:
                            break
                        continue
                    if not left:
                        self._scheduled = True
                        self._reactor.callLater(0, self._continue)
                        break
                    left -= 1
                    operation = self._requests.next()  # type: ignore[union-attr]
                    if operation is None:
                        break
                    self._state = _WORKING
                    reply: Any = self._handle(operation)  # type: ignore[misc]
                    if type(reply) is bytes:
                        self._reply(reply)
                    else:
                        self._await(reply, self._reply)
                elif state is not _GREETING or not self._greet():
                    break
            except Exception:  # noqa: BLE001
                self._failed(Failure())  # type: ignore[no-untyped-call]
        self._processing = False
        self._flush()
        self._update_reading()

    def _continue(self) -> None:
        self._scheduled = False
        self._process()

    def _greet(self) -> bool:
        """Go on with the handshake; whether it is whole."""
        handshake = self._handshake
        assert handshake is not None
        try:
            greeting = handshake.resume(self._source)
        finally:
            self.minor = handshake.minor
            if handshake.to_send:
                self._put(handshake.to_send)
                handshake.to_send = b""
        if greeting is MORE:
            return False
        self._handshake = None
        if greeting.cpu is not None:
            _log.debug("client asks for processor {cpu}: ignored", cpu=greeting.cpu)
        refused = _REMOTE_REFUSES if self.peer is None else None
        self._requests = Requests(self._source, self.minor, refused)
        self._state = _WORKING
        session = self._factory(self, greeting)
        if isinstance(session, Awaitable):
            self._await(session, self._begin)
        else:
            self._begin(session)
        return True

    def _begin(self, session: Session) -> None:
        """The handshake is over."""
        self._session = session
        self._handle = session.handle
        if self._state is _WORKING:
            self._state = _READY
            self._put(LAST)

    # Work that takes time, and how it ends.

    def _await(self, result: Awaitable[Any], then: Callable[[Any], None]) -> None:
        if isinstance(result, Deferred):
            work: Deferred[Any] = result
        elif isinstance(result, Coroutine):
            work = Deferred.fromCoroutine(result)
        else:
            raise TypeError(f"neither a reply nor a Deferred nor a coroutine: {result!r}")
        self._work = work
        work.addCallbacks(then, self._failed)
        work.addBoth(self._worked)
        if self._state is _CLOSED:
            work.cancel()

    def _reply(self, payload: bytes) -> None:
        if self._state is _WORKING:
            self._state = _READY
            self._out += (LAST, payload)
            self.pending += 8 + len(payload)
        elif self._state is not _CLOSED:
            raise RuntimeError(f"a request was answered while {self._state.value}")

    def _failed(self, failure: Failure) -> None:
        error, state = failure.value, self._state
        expected = isinstance(error, GuixdError | CancelledError | MemoryError)
        if not expected:
            _log.failure("a request failed in an unexpected way", failure)
        if state is _CLOSED:
            return
        if isinstance(error, NotAClient):
            self._close()
            return
        if isinstance(error, GuixdError):
            text, status = error.text, error.status
        elif isinstance(error, CancelledError):
            text, status = "the build daemon is stopping; try again when it is back", 1
        elif isinstance(error, MemoryError):
            text, status = "out of memory", 1
        else:
            text, status = f"internal error of the build daemon: {error!r}", 1
        self._put(encode_error(text, status, self.minor))
        if (
            state is _WORKING
            and self._session is not None
            and isinstance(error, GuixdError | CancelledError)
            and not isinstance(error, ProtocolError)
        ):
            self._state = _READY
        else:
            # Log files take no surrogate escapes.
            shown = text.encode("utf-8", "backslashreplace").decode()
            _log.warn("unexpected build daemon error: {text}", text=shown, peer=self.peer)
            self._source.rest()
            self._consumer = None
            self._state = _LINGERING
            self._linger_timer = self._reactor.callLater(LINGER_SECONDS, self._linger_ended)

    def _worked(self, result: object) -> None:
        self._work = None
        if isinstance(result, Failure):
            _log.failure("a connection failed", result)
            self._close()
        elif self._state is _CLOSED:
            self._finish()
        elif not self._processing:
            self._process()
            self._source.settle()

    def _forget_drained(self, waiting: Deferred[None]) -> None:
        self._drained.remove(waiting)

    # Output.

    def _put(self, data: bytes) -> None:
        """Queue DATA for the next flush."""
        self._out.append(data)
        self.pending += len(data)

    def _send(self, data: bytes) -> None:
        """Send DATA at once if nothing is waiting before it."""
        if self._state is _CLOSED:
            return
        self._out.append(data)
        self.pending += len(data)
        if self._writing:
            self._watch_water()
        elif not self._processing:
            self._flush()

    def _flush(self) -> None:
        out = self._out
        try:
            while out:
                if self._sent:
                    size = self._socket.send(memoryview(out[0])[self._sent :])
                else:
                    if len(out) > 1 and self.pending <= HIGH_WATER:
                        out[:] = [b"".join(out)]
                    size = self._socket.send(out[0])
                self.pending -= size
                self._sent += size
                if self._sent < len(out[0]):
                    break
                del out[0]
                self._sent = 0
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._close()
            return
        if bool(out) is not self._writing:
            self._writing = not self._writing
            if self._writing:
                self._reactor.addWriter(self)
            else:
                self._reactor.removeWriter(self)
        self._watch_water()
        if not out and self._state is _CLOSING:
            self._close()
        elif not out and self._state is _LINGERING:
            try:
                self._socket.shutdown(sockets.SHUT_WR)
            except OSError:
                self._close()

    def _watch_water(self) -> None:
        """Tell whoever makes output when to pause and when to go on."""
        slow = self.pending > (LOW_WATER if self._slow else HIGH_WATER)
        if slow is not self._slow:
            self._slow = slow
            if self._session is not None:
                (self._session.paused if slow else self._session.resumed)()
        if self._drained and self.pending <= LOW_WATER:
            waiting, self._drained = self._drained, []
            for one in waiting:
                one.callback(None)

    def _update_reading(self) -> None:
        """Watch the socket for input if there is room for it, else for the client's leaving."""
        state = self._state
        if state is _READY or state is _GREETING:
            wanted = self.pending <= HIGH_WATER
        elif state is _WORKING:
            wanted = len(self._source) < EARLY_INPUT
        elif state is _STREAMING:
            wanted = not self._paused
        else:
            wanted = state is _LINGERING
        if wanted is not self._reading:
            self._reading = wanted
            (self._reactor.addReader if wanted else self._reactor.removeReader)(self)
        if self._watch is not None:
            if wanted:
                self._watch.stop()
                self._watch = None
        elif state is _WORKING and not wanted:
            self._watch = HangupWatch(self._reactor, self._socket, self._close)

    # The end.

    def _linger_ended(self) -> None:
        self._linger_timer = None
        self._close()

    def _close(self) -> None:
        if self._state is _CLOSED:
            return
        self._state = _CLOSED
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        self._reading = self._writing = False
        self._socket.close()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        self._out.clear()
        self._sent = self.pending = 0
        self._source.rest()
        self._consumer = None
        if self._work is None:
            self._finish()
        else:
            # What the work has just sent may have told that the client is gone, and only
            # work that waits can be cancelled.
            self._reactor.callLater(0, self.give_up)

    def _finish(self) -> None:
        """Tell that all is over, once."""
        session, self._session, self._handle = self._session, None, None
        closed, self._closed = self._closed, None
        try:
            if session is not None:
                session.disconnected()
        except Exception:  # noqa: BLE001
            _log.failure("a session failed to end")
        if closed is not None:
            closed(self)
