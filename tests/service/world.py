"""A daemon in a directory and clients that may misbehave."""

from __future__ import annotations

import os
import socket
from typing import Any, cast

from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.endpoints import TCP4ClientEndpoint, UNIXClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from guixd.client import Client, RequestFailed, connect
from guixd.formats.messages import Failed, Greeting, Last, Message, MessageReader
from guixd.formats.operations import Operation, SetOptions
from guixd.formats.path import StoreDirectory, StorePath
from guixd.formats.wire import MORE, Source
from guixd.testing import FakeBuilder, TemporaryDaemon
from tests.support import temporary_directory

_GREETING = Greeting()


class RawClient(Protocol):
    """Sends bytes and waits for the daemon to close."""

    def __init__(self) -> None:
        self.data = b""
        self.closed: Deferred[bytes] = Deferred()
        self._awaited: list[tuple[bytes, Deferred[None]]] = []

    def received(self, part: bytes) -> Deferred[None]:
        """Return what fires when PART has been received."""
        found: Deferred[None] = Deferred()
        self._awaited.append((part, found))
        self.dataReceived(b"")
        return found

    def dataReceived(self, data: bytes) -> None:
        self.data += data
        for pair in list(self._awaited):
            if pair[0] in self.data:
                self._awaited.remove(pair)
                pair[1].callback(None)

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.closed.callback(self.data)


class EndpointAs:
    """Connects to the socket file PATH as the user UID; for root only."""

    def __init__(self, path: str, uid: int) -> None:
        self._path = path
        self._uid = uid

    def connect(self, factory: Factory) -> Deferred[Any]:
        protocol = factory.buildProtocol(None)
        with socket.socket(socket.AF_UNIX) as connection:
            os.seteuid(self._uid)
            try:
                connection.connect(self._path)
            finally:
                os.seteuid(0)
            reactor.adoptStreamConnection(
                connection.fileno(), connection.family, Factory.forProtocol(lambda: protocol)
            )
        return succeed(protocol)


def messages(data: bytes) -> list[Message]:
    """Read the messages after the two words of the handshake; no replies among them."""
    source = Source()
    source.feed(data[16:])
    found = []
    while len(source):
        message = MessageReader().resume(source)
        assert message is not MORE
        found.append(message)
    return found


class DaemonCase(TestCase):
    """A test with a daemon of its own, on a Unix socket and, if it wants, on TCP."""

    timeout = 30
    tcp = False
    options: dict[str, Any] = {}

    def setUp(self) -> None:
        self.directory = temporary_directory(self, world_readable=True)
        self.builder = FakeBuilder()
        self.daemon = self.make(builder=self.builder, **self.options)
        self.daemon.start()
        self.addCleanup(self.daemon.stop)
        self.store = StoreDirectory(self.directory + "/store")

    def make(self, **options: Any) -> TemporaryDaemon:
        socket = self.directory + "/var/daemon-socket/socket"
        listen = (socket, "127.0.0.1:0") if self.tcp else (socket,)
        return TemporaryDaemon(reactor, self.directory, listen=listen, **options)

    @property
    def unix(self) -> UNIXClientEndpoint:
        return UNIXClientEndpoint(reactor, self.daemon.socket)

    @property
    def port(self) -> TCP4ClientEndpoint:
        port = int(self.daemon.service.listeners.descriptions[1].rpartition(":")[2])
        return TCP4ClientEndpoint(reactor, "127.0.0.1", port)

    async def client(self, endpoint: Any = None) -> Client:
        """Return a client that is closed at the end; what it logs is in `self.log`."""
        self.log: list[bytes] = []
        client = await connect(endpoint or self.unix, store=self.store, log=self.log.append)
        self.addCleanup(client.close)
        return client

    async def raw(
        self,
        endpoint: Any = None,
        *requests: bytes | Operation[Any],
        greeting: Greeting = _GREETING,
    ) -> RawClient:
        """Return a client that has sent a greeting and REQUESTS."""
        client = cast(
            RawClient, await (endpoint or self.unix).connect(Factory.forProtocol(RawClient))
        )
        sent = [r if isinstance(r, bytes) else r.encode() for r in requests]
        client.transport.write(greeting.encode() + b"".join(sent))
        self.addCleanup(client.transport.loseConnection)
        return client

    async def refused(self, *requests: bytes | Operation[Any], endpoint: Any = None) -> Failed:
        """Send REQUESTS, of which the last makes the daemon close; return its error."""
        client = await self.raw(endpoint, *requests)
        first, *rest = messages(await client.closed)
        self.assertEqual(first, Last())
        error = rest[-1]
        assert isinstance(error, Failed)
        self.assertEqual(len(rest), 1)
        return error

    async def fails(self, work: Deferred[Any]) -> str:
        """Return the text of the error that WORK ends with."""
        try:
            await work
        except RequestFailed as error:
            return error.text
        raise AssertionError("did not fail")

    def path(self, name: str) -> StorePath:
        """Return a path that is not in the store."""
        return self.store.child("0" * 32 + "-" + name)


def set_options(*pairs: tuple[str, str], **fields: Any) -> SetOptions:
    """Return a request with the defaults of a quiet client."""
    values: dict[str, Any] = {
        "keep_failed": False,
        "keep_going": False,
        "try_fallback": False,
        "verbosity": 0,
        "use_offload": False,
        "build_verbosity": 0,
        "log_type": 2,
        "print_build_trace": True,
        "use_substitutes": True,
    }
    return SetOptions(**{**values, **fields}, pairs=pairs)
