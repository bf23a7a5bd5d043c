"""What a connection, who gives its requests their meaning, and who builds know of each other."""

from __future__ import annotations

import socket as sockets
from collections.abc import Awaitable
from dataclasses import dataclass
from enum import Enum
from struct import Struct
from typing import Any, Protocol

from twisted.internet.defer import Deferred

from guixd.build.broadcast import Observer
from guixd.build.request import BuildRequest
from guixd.formats.operations import Operation

_credentials = Struct("3i")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a Unix socket, as the kernel knew at its connect."""

    pid: int
    uid: int
    gid: int


class Session(Protocol):
    """What a connection needs of who gives requests their meaning."""

    def handle(self, operation: Operation[Any]) -> bytes | Awaitable[bytes]:
        """Carry out a request and return its encoded reply, now or later.

        Later means a Deferred or a coroutine; it is cancelled if the client leaves.
        A `ProtocolError` ends the connection after the client has got the text,
        and so does any error while the stream is taken over; after another
        `GuixdError` the connection goes on.
        """
        ...

    def paused(self) -> None:
        """The client reads slower than we write; make nothing more for it."""
        ...

    def resumed(self) -> None:
        """The client has caught up."""
        ...

    def disconnected(self) -> None:
        """The connection is over and so is its work; called once."""
        ...


class Builder(Protocol):
    """`interfaces.IBuilder` for the type checker."""

    def build(self, request: BuildRequest, observer: Observer) -> Deferred[None]: ...
    def freed(self) -> None: ...
    def close(self) -> None: ...
    def stop(self) -> Deferred[None]: ...


class StreamConsumer(Protocol):
    """Gets raw bytes of the client, see `Connection.take_over`."""

    def received(self, data: bytes) -> None:
        """Use DATA, now or later."""
        ...


def peer_credentials(socket: sockets.socket) -> Peer | None:
    """Return who is at the other end; None if it is not a Unix socket."""
    if socket.family != sockets.AF_UNIX:
        return None
    raw = socket.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _credentials.size)
    return Peer(*_credentials.unpack(raw))


class State(Enum):
    """Where a connection stands."""

    GREETING = "greeting"
    READY = "ready"
    """Between requests or within the arguments of one."""
    WORKING = "working"
    STREAMING = "streaming"
    """Somebody has taken over the stream."""
    LINGERING = "lingering"
    """All is said; wait a moment so that the client gets it."""
    CLOSING = "closing"
    """The client sends nothing more; it shall get the replies."""
    CLOSED = "closed"
