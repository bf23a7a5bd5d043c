"""Bodies through the fetcher, from servers good and bad (spec: downloads §4; W8, W10, W11, W22)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from zope.interface.verify import verifyObject

from guixd.errors import FetchError
from guixd.interfaces import IFetcher
from guixd.net.client import Fetcher
from guixd.net.requests import Answer
from guixd.net.spawning import StartedFetcher
from guixd.testing import FakeFetcher
from tests.net.servers import Asked, FetcherCase, Server, always, answer, unused_port


class GoodServerTest(FetcherCase):
    async def test_one_connection_serves_several_requests(self) -> None:
        server = Server(self, always(answer(b"hello")))
        for _ in range(3):
            body, fetched = await self.fetch(server.url())
            self.assertEqual((body, fetched.received, fetched.written), (b"hello", 5, 5))
        self.assertEqual(len(server.connections), 1)
        self.assertIn("User-Agent: GNU Guile", server.requests[0])

    async def test_a_connection_that_ends_with_its_answer(self) -> None:
        """W8: the server says so, but does not close it."""
        server = Server(self, always(answer(b"hello", Connection="close")))
        for connections in (1, 2):
            await self.fetch(server.url())
            self.assertEqual(len(server.connections), connections)

    async def test_a_connection_that_was_kept_too_long(self) -> None:
        """W8: the server has closed it when it is used again."""

        def script(connection: Asked, _: str) -> None:
            connection.reset() if len(connection.requests) == 2 else connection.send(answer(b"x"))

        server = Server(self, script)
        for connections in (1, 2):
            self.assertEqual((await self.fetch(server.url()))[0], b"x")
            self.assertEqual(len(server.connections), connections)

    async def test_large_bodies_come_whole(self) -> None:
        content = os.urandom(3 << 20)
        server = Server(self, always(answer(content)))
        body, fetched = await self.fetch(server.url())
        self.assertEqual(body, content)
        self.assertEqual(fetched.head.size, len(content))

    async def test_chunked_bodies(self) -> None:
        """W8"""
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        text = b"5;x=y\r\nhello\r\n3\r\n, w\r\n0\r\n\r\n"
        server = Server(self, always(head + text))
        self.assertEqual((await self.fetch(server.url()))[0], b"hello, w")

    async def test_bodies_that_end_with_the_connection(self) -> None:
        def script(connection: Asked, _: str) -> None:
            connection.send(b"HTTP/1.0 200 OK\r\n\r\nhello")
            connection.close()

        server = Server(self, script)
        self.assertEqual((await self.fetch(server.url()))[0], b"hello")

    async def test_bodies_that_nothing_ends(self) -> None:
        """U14: the size that is known from elsewhere tells where they end, if it must."""
        known = {"limit": 5, "exact": True}
        server = Server(self, always(b"HTTP/1.1 200 OK\r\n\r\nhello"))
        self.assertEqual((await self.fetch(server.url(), **known))[0], b"hello")
        server.script = always(b"HTTP/1.1 200 OK\r\n\r\nhello, world")
        self.assertEqual((await self.refused(server.url(), **known)).kind, "limit")
        for body in (
            b"Content-Length: 6\r\n\r\nhello",
            b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello",
        ):
            server.script = always(b"HTTP/1.1 200 OK\r\n" + body)
            error = await self.refused(server.url(), idle_timeout=0.2, **known)
            self.assertEqual(error.kind, "timeout")

    async def test_many_lookups_at_once(self) -> None:
        def script(connection: Asked, request: str) -> None:
            number = request.split()[1].removeprefix("/")
            if number == "7":
                connection.send(answer(status="404 Not Found", Cache_Control="max-age=60"))
            else:
                connection.send(answer(number.encode()))

        server = Server(self, script)
        answers: dict[int, Answer] = {}
        urls = [server.url(f"/{number}") for number in range(500)]
        await self.fetcher.lookup(urls, answers.__setitem__)
        self.assertEqual(answers[7], Answer(404, b"", 60))
        del answers[7]
        self.assertEqual({n: a.body for n, a in answers.items()}, _bodies(500, 7))
        self.assertLess(len(server.connections), 10)


def _bodies(count: int, without: int) -> dict[int, bytes]:
    return {number: b"%d" % number for number in range(count) if number != without}


class BadServerTest(FetcherCase):
    async def test_short_bodies(self) -> None:
        """W8"""

        def script(connection: Asked, _: str) -> None:
            connection.send(answer(b"hello", length=10))
            connection.close()

        error = await self.refused(Server(self, script).url())
        self.assertEqual(error.kind, "body")

    async def test_refused_connections_and_statuses(self) -> None:
        """W8"""
        error = await self.refused(f"http://127.0.0.1:{unused_port()}/")
        self.assertEqual(error.kind, "connect")
        error = await self.refused(Server(self, always(answer(status="404 No"))).url())
        self.assertEqual((error.kind, error.http_status), ("http", 404))

    async def test_stalled_servers_time_out(self) -> None:
        """W8"""
        server = Server(self, always(answer(b"hello", length=10)))
        error = await self.refused(server.url(), idle_timeout=0.2)
        self.assertEqual(error.kind, "timeout")


class ProcessTest(FetcherCase):
    async def test_the_process_has_no_privileges(self) -> None:
        """W22"""
        server = Server(self, always(answer(b"hello")))
        await self.fetch(server.url())
        process = Path(f"/proc/{self.fetcher.pid}")
        text = (process / "status").read_text()
        status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        if os.getuid() == 0:
            for name in ("Uid", "Gid", "Groups"):
                self.assertNotIn("0", status[name].split())
            for name in ("Inh", "Prm", "Eff", "Bnd", "Amb"):
                self.assertEqual(int(status[f"Cap{name}"], 16), 0, name)
            self.assertEqual(status["NoNewPrivs"], "1")
            for name in ("mnt", "ipc", "uts"):
                self.assertNotEqual(
                    *(os.readlink(p / "ns" / name) for p in (process, Path("/proc/self")))
                )
            limits = (process / "limits").read_text()
            for name in ("core file size", "file size"):
                self.assertRegex(limits, f"Max {name} +0 +0 ")
            self.assertEqual((process / "mem").stat().st_uid, 0)  # It cannot be traced.

    async def test_a_process_that_was_started_before(self) -> None:
        """It is used, and ends when the daemon hangs up without having used it."""
        server = Server(self, always(answer(b"hello")))
        ahead = StartedFetcher({})
        fetcher = Fetcher(reactor, {}, ahead)
        self.addCleanup(fetcher.stop)
        self.assertEqual((await self.fetch(server.url(), fetcher=fetcher))[0], b"hello")
        self.assertEqual(fetcher.pid, ahead.process.pid)
        unused = StartedFetcher({})
        unused.end.close()
        self.assertEqual(unused.process.wait(20), 0)

    async def test_a_killed_process_is_replaced(self) -> None:
        asked: Deferred[None] = Deferred()
        server = Server(self, lambda connection, _: asked.callback(None))
        running = Deferred.fromCoroutine(self.fetch(server.url()))
        await asked
        os.kill(self.fetcher.pid, signal.SIGKILL)
        error = await self.assertFailure(running, FetchError)
        self.assertEqual(error.kind, "fetcher")
        server.script = always(answer(b"again"))
        self.assertEqual((await self.fetch(server.url()))[0], b"again")


class FakeTest(FetcherCase):
    async def test_the_public_fake_is_like_the_real_one(self) -> None:
        server = Server(self, always(answer(b"hello")))
        missing = Server(self, always(answer(status="404 Not Found")))
        fake = FakeFetcher({server.url(): b"hello"})
        verifyObject(IFetcher, fake)
        verifyObject(IFetcher, self.fetcher)
        for url in (server.url(), missing.url()):
            outcomes = []
            for fetcher in (self.fetcher, fake):
                answers: dict[int, Answer] = {}
                await fetcher.lookup([url], answers.__setitem__)
                try:
                    body, fetched = await self.fetch(url, fetcher=fetcher)
                    outcomes.append((answers, body, fetched))
                except FetchError as error:
                    outcomes.append((answers, error.kind, error.http_status))
            self.assertEqual(*outcomes)
