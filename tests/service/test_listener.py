"""Accepting clients."""

from __future__ import annotations

import errno
import os
import resource
import socket

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from guixd.formats import operations as op
from guixd.formats.messages import ANSWER, LAST, Greeting
from guixd.formats.path import StoreDirectory
from guixd.formats.wire import encode_int
from guixd.service.connection import Connection
from guixd.service.listener import Listener
from tests.service.peers import GREETED, FarEnd, Recorder, asynchronous
from tests.support import temporary_directory

YES = encode_int(1)


class Listening(TestCase):
    """A listener on a real socket."""

    def setUp(self) -> None:
        self.path = temporary_directory(self) + "/socket"
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(self.path)
        self.server.listen(200)
        self.sessions: list[Recorder] = []
        self.listener = Listener(reactor, self.server, self.begin, store=StoreDirectory())
        self.listener.start()
        self.addCleanup(self.listener.stop)

    def begin(self, connection: Connection, greeting: Greeting) -> Recorder:
        session = Recorder(connection, {op.IsValidPath: lambda operation: YES})
        self.sessions.append(session)
        return session

    def connect(self) -> FarEnd:
        """Return a client that has said its greeting."""
        from twisted.internet.protocol import Factory

        far = FarEnd()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.path)
            client.setblocking(False)
            reactor.adoptStreamConnection(
                client.fileno(), client.family, Factory.forProtocol(lambda: far)
            )
        self.addCleanup(self.leave, far)
        far.send(Greeting().encode())
        return far

    def leave(self, far: FarEnd) -> Deferred[bytes]:
        far.transport.abortConnection()
        return far.rest()

    @asynchronous
    async def test_many(self) -> None:
        """Many clients at once are all served, and their descriptors are not inherited."""
        clients = [self.connect() for _ in range(100)]
        for far in clients:
            self.assertEqual(await far.read(GREETED), ANSWER + LAST)
        self.assertEqual(len(self.listener.connections), 100)
        for connection in self.listener.connections:
            self.assertFalse(os.get_inheritable(connection.fileno()))
        for far in clients:
            far.send(op.IsValidPath("x").encode())
        for far in clients:
            self.assertEqual(await far.read(16), LAST + YES)
        for far in clients:
            far.transport.loseConnection()
        for session in self.sessions:
            await session.over
        await turn()
        self.assertEqual(self.listener.connections, set())

    @asynchronous
    async def test_descriptors_run_out(self) -> None:
        """Without free descriptors clients wait, and are served when one has left."""
        first, second = self.connect(), self.connect()
        await first.read(GREETED)
        await second.read(GREETED)
        third = self.connect()
        await third.read(GREETED)
        waiting = socket.socket(socket.AF_UNIX)
        self.addCleanup(waiting.close)
        hoard: list[int] = []
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
        try:
            while True:
                hoard.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            pass
        try:
            waiting.connect(self.path)
            waiting.sendall(Greeting().encode())
            self.listener.doRead()
            self.assertIsNotNone(self.listener._retry)
            self.assertEqual(len(self.listener.connections), 3)
            session = self.sessions[0]
            session.connection.abort()
            await session.over
            self.assertIsNone(self.listener._retry)
            while len(self.sessions) < 4:
                await turn()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for fd in hoard:
                os.close(fd)
        waiting.settimeout(10)
        self.assertEqual(waiting.recv(100), ANSWER + LAST)

    @asynchronous
    async def test_cannot_start(self) -> None:
        """A connection that fails at once is over; others are served, and all can end."""
        start = Connection.start

        def fail(connection: Connection) -> None:
            self.patch(Connection, "start", start)
            raise OSError(errno.EMFILE, "no descriptors")

        self.patch(Connection, "start", fail)
        await self.connect().rest()
        self.assertEqual(len(self.flushLoggedErrors(OSError)), 1)
        self.assertEqual(self.listener.connections, set())
        await self.connect().read(GREETED)

    @asynchronous
    async def test_stop(self) -> None:
        """Stopping disconnects everybody; it is over when their sessions are."""
        far = self.connect()
        await far.read(GREETED)
        await self.listener.stop()
        self.assertEqual(self.sessions[0].events, ["disconnected"])
        self.assertEqual(await far.rest(), b"")
        self.assertEqual(self.server.fileno(), -1)
        await self.listener.stop()


def turn() -> Deferred[None]:
    """Wait for the reactor's next turn."""
    turned: Deferred[None] = Deferred()
    reactor.callLater(0, turned.callback, None)
    return turned
