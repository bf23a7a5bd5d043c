"""Lookups with a server that stalls, in this process, as its limits are long (U11)."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import TestCase

from guixd.net import lookups
from guixd.net.connections import Connection, Connections
from guixd.net.lookups import CONNECTIONS, STALL, Lookups
from guixd.net.proxies import Proxies
from guixd.net.requests import Answer
from tests.net.servers import Asked, Server, always, answer


class _Recorded(Connections):
    """Remembers all of them."""

    opening = 0

    def __init__(self) -> None:
        super().__init__(reactor, lambda: None)
        self.opened: list[Connection] = []

    async def open(self, *arguments: Any) -> Connection:
        self.opening += 1
        try:
            connection = await super().open(*arguments)
        finally:
            self.opening -= 1
        self.opened.append(connection)
        return connection


class StallTest(TestCase):
    timeout = 30

    def setUp(self) -> None:
        self.clock = Clock()
        self.connections = _Recorded()
        self.addCleanup(self.close)
        self.lookups = Lookups(self.clock, self.connections, Proxies())
        self.answers: dict[int, Answer] = {}
        self.held: set[str] = set()
        self.rest: Deferred[None] = Deferred()
        self.done: Deferred[None] = Deferred()

    def close(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self.close_all())

    async def close_all(self) -> None:
        self.connections.close()
        while self.connections.opening or any(each.alive for each in self.connections.opened):
            for each in self.connections.opened:
                each.abort()
            await deferLater(reactor, 0)

    def look(self, count: int) -> None:
        """Fire `rest` when all of COUNT questions are answered or held."""
        if len(self.answers) + len(self.held) == count and not self.rest.called:
            self.rest.callback(None)

    def ask(self, server: Server, count: int) -> None:
        def answered(number: int, answer: Answer) -> None:
            self.answers[number] = answer
            self.look(count)
            if len(self.answers) == count:
                self.done.callback(None)

        urls = [server.url(f"/{number}") for number in range(count)]
        self.lookups.ask(urls, {}, False, answered)

    async def test_servers_that_never_answer(self) -> None:
        """U11: all questions fail at once."""
        server = Server(self, lambda connection, _: None)
        self.ask(server, 100)
        for _ in range(8):
            await server.arrivals.get()
        self.clock.advance(STALL)
        self.assertEqual(self.answers, {})
        self.clock.advance(STALL)
        await self.done
        self.assertEqual({each.kind for each in self.answers.values()}, {"timeout"})
        self.assertLess(len(server.requests), 10)

    async def test_servers_that_drip(self) -> None:
        """U11: a byte now and then is no answer."""
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"
        server = Server(self, lambda connection, _: connection.send(head))
        self.ask(server, 3)
        for _ in range(3):
            await server.arrivals.get()
        for _ in range(3):
            before = [each.received for each in self.connections.opened]
            for connection in server.connections:
                connection.send(b"x")
            while any(
                each.alive and each.received <= size
                for each, size in zip(self.connections.opened, before, strict=True)
            ):
                await deferLater(reactor, 0)
            self.clock.advance(STALL)
        await deferLater(reactor, 0)
        self.assertEqual([each.status for each in self.answers.values()], [0, 0, 0])

    async def test_connections_are_kept(self) -> None:
        """U14: the next questions go over the same connections, and no more are opened."""
        server = Server(self, lambda connection, _: connection.send(answer(b"x")))
        for _ in range(3):
            self.answers, self.done = {}, Deferred()
            self.ask(server, 100)
            await self.done
            alive = sum(each.alive for each in self.connections.opened)
            self.assertLessEqual(alive + self.connections.opening, CONNECTIONS)

    async def test_connections_that_say_nothing(self) -> None:
        """U14: their questions are put again on others, without any waiting."""
        silent: list[Asked] = []

        def script(connection: Asked, _request: str) -> None:
            if len(silent) < 3 and connection not in silent:
                silent.append(connection)
            if connection not in silent:
                connection.send(answer(b"x"))

        server = Server(self, script)
        self.ask(server, 40)
        await self.done
        self.assertEqual({each.status for each in self.answers.values()}, {200})
        self.assertGreaterEqual(len(server.requests), 40 + len(silent))

    async def test_servers_that_answer_some(self) -> None:
        """U11: the others fail, and the rest is asked."""

        def script(connection: Asked, request: str) -> None:
            if any(asked.startswith("GET /1 ") for asked in connection.requests):
                self.held.add(request)
                self.look(50)
            else:
                connection.send(answer(b"x"))

        server = Server(self, script)
        self.ask(server, 50)
        await self.rest
        while not self.done.called:
            self.clock.advance(STALL)
            await deferLater(reactor, 0)
        kinds = [each.kind for each in self.answers.values()]
        self.assertEqual((kinds.count(""), self.answers[1].kind), (49, "timeout"))

    async def test_many_servers(self) -> None:
        """U11: whoever names ever more servers does not make it remember them all."""
        self.patch(lookups, "_MOST_SERVERS", 3)
        for number in range(10):
            self.answers.clear()
            self.done = Deferred()
            self.ask(Server(self, always(answer(b"x")), f"127.0.0.{number + 1}"), 2)
            await self.done
            self.assertEqual([each.body for each in self.answers.values()], [b"x"] * 2)
            await deferLater(reactor, 0)
            self.assertLessEqual(len(self.lookups._servers), 3)
