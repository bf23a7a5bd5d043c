"""What the requests of one client mean (spec: protocol §4, §5).

A table maps each type of request to a function of the session and the request;
it returns the reply, or a coroutine that does when it has to wait.  This is
also the one place where errors become what the client reads.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from types import CoroutineType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from guixd.build.request import ClientOptions, Level
from guixd.errors import Busy, GuixdError, ProtocolError, StoreError
from guixd.formats.operations import Operation, encode_reply
from guixd.service.clientlog import ClientLog
from guixd.service.clientoptions import SessionOptions
from guixd.service.connection import Connection, Peer

if TYPE_CHECKING:
    from guixd.service.shared import Daemon
    from guixd.store.local import LocalStore

T = TypeVar("T")
FIRST_DELAY = 0.005
LONGEST_DELAY = 0.5
"""Seconds between attempts to get what another process holds."""
Handler: TypeAlias = Callable[["Session", Any], Any]
Handlers: TypeAlias = Mapping[type[Operation[Any]], Handler]
QuickHandlers: TypeAlias = Mapping[type[Operation[Any]], Callable[["Session", Any], bytes | None]]
"""For frequent requests: they return the encoded reply, and log nothing.

If there is none, as it will take longer, the request goes to its ordinary handler.
"""


class Encoded(bytes):
    """A reply that has been encoded already."""


class QuietError(ProtocolError):
    """A request is refused so that the connection ends with it (spec: protocol §4)."""

    def __init__(self, error: GuixdError) -> None:
        super().__init__(error.text)
        self.status = error.status


def presentable(error: Exception) -> Exception:
    """Return ERROR as the client shall read it; defects of the daemon stay as they are."""
    if isinstance(error, OSError):
        where = f" '{error.filename}'" if error.filename else ""
        return StoreError(f"cannot access{where}: {error.strerror or error}")
    if isinstance(error, MemoryError):
        return ProtocolError("out of memory")
    return error


class Session:
    """One client.

    :ivar peer: who it is; None if it is connected by TCP.
    :ivar trusted: whether it has the daemon's own rights (spec: protocol §7).
    :ivar log: what it sees of the log.
    :ivar roots: what it protects from the collector until it leaves.
    """

    __slots__ = (
        "_handlers",
        "_quick",
        "connection",
        "daemon",
        "log",
        "options",
        "peer",
        "roots",
        "store",
        "trusted",
    )

    def __init__(
        self,
        daemon: Daemon,
        store: LocalStore,
        connection: Connection,
        handlers: Handlers,
        quick: QuickHandlers,
    ) -> None:
        self.daemon = daemon
        self.store = store
        self.connection = connection
        self.peer: Peer | None = connection.peer
        self.trusted = self.peer is not None and self.peer.uid in (0, daemon.uid)
        self.options = SessionOptions(
            daemon.settings, trusted=self.trusted, remote=self.peer is None
        )
        self.log = ClientLog(connection, self.options)
        self.roots = store.temp_roots()
        self._handlers = handlers
        self._quick = quick

    def build_options(self) -> ClientOptions:
        """Return the options of a build that the client asks for now.

        :raises BadSetting: the number of rounds is no integer.
        """
        peer = self.peer
        owner = (None, None) if peer is None else (peer.uid, peer.gid)
        return self.options.for_builds(*owner)

    def handle(self, operation: Operation[Any]) -> bytes | Deferred[bytes]:
        """Carry OPERATION out; return its reply, now or later."""
        quick = self._quick.get(type(operation))
        if quick is not None:
            try:
                reply = quick(self, operation)
            except Busy:
                reply = None
            except OSError as error:
                raise presentable(error) from error
            if reply is not None:
                return reply
        self.log.working = True
        try:
            handler = self._handlers[type(operation)]
            try:
                result = handler(self, operation)
            except Busy:
                result = self._again(lambda: handler(self, operation))
        except Exception as error:
            self.log.finish()
            shown = presentable(error)
            if shown is error:
                raise
            raise shown from error
        if type(result) is CoroutineType:
            return Deferred.fromCoroutine(self._later(operation, result))
        self.log.finish()
        self.daemon.tidy()
        return encode_reply(operation, result, self.connection.minor)

    async def _later(self, operation: Operation[T], work: Coroutine[Any, Any, T]) -> bytes:
        try:
            result = await work
        except Exception as error:
            shown = presentable(error)
            if shown is error:
                raise
            raise shown from error
        finally:
            self.log.finish()
            self.daemon.tidy()
        if isinstance(result, Encoded):
            return bytes(result)
        return encode_reply(operation, result, self.connection.minor)

    async def _again(self, step: Callable[[], Any]) -> Any:
        result = await self.when_free(step)
        return await result if type(result) is CoroutineType else result

    async def when_free(self, step: Callable[[], T]) -> T:
        """Return what STEP returns; try again while a foreign process is in its way.

        The client is told.  Nothing tells us when the other is done, so that we
        have to look from time to time.
        """
        told = False
        delay = FIRST_DELAY
        while True:
            try:
                return step()
            except Busy as busy:
                if not told:
                    self.log.log(Level.INFO, f"{busy.text}; waiting")
                    told = True
            await deferLater(self.daemon.reactor, delay)
            delay = min(2 * delay, LONGEST_DELAY)

    def paused(self) -> None:
        """The client reads too slowly; builders ask `ClientLog.full`."""

    def resumed(self) -> None:
        """The client has caught up."""

    def disconnected(self) -> None:
        """Give back what the session holds."""
        self.log.working = False
        self.daemon.sessions.discard(self)
        self.roots.close()
