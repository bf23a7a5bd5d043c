"""Clients of one daemon take turns."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from guixd.formats.messages import Greeting
from guixd.formats.path import StoreDirectory
from guixd.service.connection import REQUESTS_PER_TURN, Connection
from guixd.service.listener import Listener
from tests.service.peers import IS_VALID, YES, asynchronous, next_turn

FLOODS = 4


class Counted:
    """A session that notes whose requests are served, in their order."""

    def __init__(self, connection: Connection, served: list[Connection]) -> None:
        self.connection = connection
        self.served = served

    def handle(self, operation: object) -> bytes:
        self.served.append(self.connection)
        return YES

    def paused(self) -> None:
        pass

    def resumed(self) -> None:
        pass

    def disconnected(self) -> None:
        pass


class TurnTests(TestCase):
    timeout = 30

    async def begin(self) -> None:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind("")
        listening.listen()
        self.address = listening.getsockname()
        self.served: list[Connection] = []
        self.connections: list[Connection] = []
        self.listener = Listener(reactor, listening, self.session, store=StoreDirectory())
        self.listener.start()
        self.addCleanup(self.listener.stop)

    def session(self, connection: Connection, greeting: Greeting) -> Any:
        self.connections.append(connection)
        return Counted(connection, self.served)

    async def client(self) -> socket.socket:
        """Return the socket of a new client, which has been greeted."""
        client = socket.socket(socket.AF_UNIX)
        self.addCleanup(client.close)
        client.connect(self.address)
        client.sendall(Greeting().encode())
        count = len(self.connections)
        while len(self.connections) == count:
            await next_turn()
        client.setblocking(False)
        return client

    def push(self, client: socket.socket) -> None:
        """Send as many requests as there is room for, and take all replies."""
        requests = IS_VALID.encode() * 100
        try:
            while client.send(requests) == len(requests):
                pass
        except BlockingIOError:
            pass
        try:
            while client.recv(1 << 20):
                pass
        except BlockingIOError:
            pass

    @asynchronous
    async def test_fairness(self) -> None:
        """Who has one request waits no longer than the others' turns, however much they send."""
        await self.begin()
        floods = [await self.client() for _ in range(FLOODS)]
        polite = await self.client()
        mine = self.connections[-1]
        waited = []
        for _ in range(100):
            for flood in floods:
                self.push(flood)
            await next_turn()
            polite.send(IS_VALID.encode())
            start = len(self.served)
            while mine not in self.served[start:]:
                for flood in floods:
                    self.push(flood)
                await next_turn()
            waited.append(self.served.index(mine, start) - start)
        self.assertGreater(len(self.served), 100 * REQUESTS_PER_TURN)
        # Each flood may have had its turn just before and just after the question.
        self.assertLessEqual(max(waited), 2 * FLOODS * REQUESTS_PER_TURN)

    @asynchronous
    async def test_stopped_readers(self) -> None:
        """Who takes no replies is not served any more, and the others are."""
        await self.begin()
        stopped = [await self.client() for _ in range(FLOODS)]
        polite = await self.client()
        mine = self.connections.pop()
        requests = IS_VALID.encode() * 100
        quiet = 0
        while quiet < 20:
            before = len(self.served)
            for client in stopped:
                try:
                    client.send(requests)
                except BlockingIOError:
                    pass
            await next_turn()
            quiet = quiet + 1 if len(self.served) == before else 0
        held = [connection.pending for connection in self.connections]
        self.assertGreater(min(held), 0)
        self.assertLess(max(held), 512 << 10)
        for _ in range(100):
            polite.send(IS_VALID.encode())
            while self.served[-1] is not mine:
                await next_turn()
            self.served.append(self.connections[0])
