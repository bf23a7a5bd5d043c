"""Servers that do wrong, and what is kept from them (W8, W10, W11, W22; substitutes §10)."""

from __future__ import annotations

import gc
import gzip
import os
import signal
import socket
from pathlib import Path
from typing import Any

from backports import zstd
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock

from guixd.errors import FetchError
from guixd.net import client, spawning
from guixd.net.codecs import decoder
from guixd.net.http1 import parse_head
from guixd.net.proxies import Proxies
from guixd.net.requests import Answer, Request
from guixd.net.transfers import Body, Transfer
from tests.net.servers import Asked, FetcherCase, Server, always, answer
from tests.support import temporary_directory


class HostileTest(FetcherCase):
    async def test_nonsense(self) -> None:
        """W8: it is an error, not the end of the process."""
        pid = 0
        for data in (b"SSH-2.0-x\r\n\r\n", b"x" * (1 << 20), b"HTTP/1.1 100 C\r\n\r\n" * 1000):
            error = await self.refused(Server(self, always(data)).url())
            self.assertEqual(error.kind, "body")
            pid = pid or self.fetcher.pid
        self.assertEqual(self.fetcher.pid, pid)

    async def test_words_for_terminals(self) -> None:
        """W24: what a server says does nothing to who reads the log."""
        status = "404 \033[31mNo\x9b\b" + "x" * 5000
        text = (await self.refused(Server(self, always(answer(status=status))).url())).text
        self.assertTrue(text.isprintable())
        self.assertLess(len(text), 2000)

    def test_what_comes_too_late(self) -> None:
        """W8: who does not want a body is not told how it ends (an error in a log)."""
        body = Body(Clock(), b"", 1.0)
        body.head(parse_head(b"HTTP/1.1 404 No"))
        body.abort()
        body.failed(FetchError("body", "broken"))
        del body
        gc.collect()

    def test_whose_fault_silence_is(self) -> None:
        """W8: while nobody takes a body its server need not send; then it has its time again."""
        time = Clock()
        body = Body(time, b"", 1.0, least=10)
        ended = self.assertFailure(body.complete, FetchError)
        body.watch()
        body.head(parse_head(b"HTTP/1.1 200 OK"))
        body.flow(lambda data: None)
        body.hold(True)
        time.pump([0.9] * 10)
        body.hold(False)
        time.advance(0.9)
        self.assertFalse(body.complete.called)
        for _ in range(9):
            body.data(b"x")
            time.advance(0.3)
        self.assertEqual(self.successResultOf(ended).kind, "timeout")

    async def test_resets(self) -> None:
        """W8"""

        def script(connection: Asked, request: str) -> None:
            if "late" in request:
                connection.send(answer(b"x", length=10))
            connection.reset()

        server = Server(self, script)
        for path in ("/early", "/late"):
            self.assertEqual((await self.refused(server.url(path))).kind, "body")

    async def test_more_than_was_asked_for(self) -> None:
        """W8: what follows an answer is not taken for the next one."""
        server = Server(self, always(answer(b"right") + answer(b"wrong")[:-3]))
        for connections in range(1, 4):
            self.assertEqual((await self.fetch(server.url()))[0], b"right")
            self.assertEqual(len(server.connections), connections)
        server.script = lambda connection, request: connection.send(
            answer(b"", "302 Found", Location="/good") + b"HTTP/1.1 404 No\r\nX: "
            if "GET /file" in request
            else answer(b"right")
        )
        self.assertEqual((await self.fetch(server.url()))[0], b"right")
        self.assertEqual(len(server.connections), 5)

    async def test_a_reset_is_no_end(self) -> None:
        """W8: not even of a body without a length."""
        server = Server(self, always(b"HTTP/1.1 200 OK\r\n\r\nhalf"))
        read_end, write_end = os.pipe()
        self.addCleanup(os.close, read_end)
        began: Deferred[object] = Deferred()
        fetching = self.fetcher.fetch(Request(server.url()), write_end, head=began.callback)
        await began
        server.connections[0].reset()
        self.assertEqual((await self.assertFailure(fetching, FetchError)).kind, "body")

    async def test_redirections(self) -> None:
        """W10: absolute, relative, of all kinds, without end, to files and nowhere."""

        def script(connection: Asked, request: str) -> None:
            path = request.split()[1]
            target = {
                "/absolute": f"http://localhost:{server.number}/good",
                "/a/relative": "../good",
                "/loop": "/loop",
                "/file": "file:///etc/passwd",
                "/gopher": "gopher://x/",
                "/broken": "http://[",
                "/plain": "a ü",
            }.get(path)
            if path in ("/good", "/a%20%C3%BC"):
                connection.send(answer(b"good"))
            elif target is None:
                connection.send(answer(status="302 Found"))
            else:
                connection.send(answer(b"moved", status=f"{kind} Moved", Location=target))

        server = Server(self, script)
        for kind in (302, 303, 307, 308):
            self.assertEqual((await self.fetch(server.url("/a/relative")))[0], b"good", kind)
        self.assertEqual(len(server.connections), 1)
        kind = 301
        error = await self.refused(server.url("/loop"), method="POST")
        self.assertEqual((error.kind, error.http_status), ("http", 301))
        for path in ("/absolute", "/a/relative"):
            body, fetched = await self.fetch(server.url(path))
            self.assertEqual(body, b"good")
            self.assertTrue(fetched.head.url.endswith("/good"))
        self.assertEqual((await self.fetch(server.url("/plain")))[0], b"good")
        for path in ("/loop", "/file", "/gopher", "/nowhere", "/broken"):
            self.assertEqual((await self.refused(server.url(path))).kind, "redirect", path)
        self.assertLess(len(server.requests), 45)

    async def test_credentials_stay_with_their_host(self) -> None:
        """W11"""
        other = Server(self, always(answer(b"good")))

        def script(connection: Asked, request: str) -> None:
            target = "/again" if "/first" in request else other.url()
            connection.send(answer(status="307 Elsewhere", Location=target))

        server = Server(self, script)
        await self.fetch(server.url("/first", "me:secret@"))
        self.assertEqual([("Basic" in request) for request in server.requests], [True, True])
        self.assertNotIn("Authorization", other.requests[0])
        self.assertNotIn("secret", other.requests[0])

    async def test_too_much(self) -> None:
        """Bombs and long bodies end where they should (spec: substitutes §10.7)."""
        bomb = gzip.compress(bytes(50 << 20))
        server = Server(self, always(answer(bomb)))
        error = await self.refused(server.url(), compression="gzip", limit=1 << 20)
        self.assertEqual(error.kind, "limit")
        body, fetched = await self.fetch(server.url(), compression="gzip")
        self.assertEqual((len(body), fetched.received), (50 << 20, len(bomb)))
        answers: dict[int, Answer] = {}
        server.script = always(answer(bytes(2 << 20)))
        await self.fetcher.lookup([server.url()], answers.__setitem__)
        self.assertEqual(answers[0].kind, "limit")

    async def test_parts(self) -> None:
        """What was had before is left out, if it is still the same."""

        def script(connection: Asked, request: str) -> None:
            if 'If-Range: "tag"' in request and "Range: bytes=5-" in request:
                fields = {"ETag": '"tag"', "Content_Range": "bytes 5-9/10"}
                connection.send(answer(b"56789", status="206 Partial Content", **fields))
            else:
                connection.send(answer(b"0123456789", ETag='"new"'))

        server = Server(self, script)
        body, fetched = await self.fetch(server.url(), offset=5, validator='"tag"')
        self.assertEqual((body, fetched.head.offset, fetched.head.size), (b"56789", 5, 10))
        chunked = "Transfer-Encoding: chunked\r\nContent-Range: bytes 5-9/10\r\n\r\n"
        response = f"HTTP/1.1 206 Partial Content\r\n{chunked}5\r\n56789\r\n0\r\n\r\n"
        other = Server(self, always(response.encode()))
        body, fetched = await self.fetch(other.url(), offset=5)
        self.assertEqual((body, fetched.head.offset, fetched.head.size), (b"56789", 5, 10))
        body, fetched = await self.fetch(server.url(), offset=5, validator='"old"')
        self.assertEqual((body, fetched.head.offset), (b"0123456789", 0))
        server.script = always(
            answer(b"x", status="206 Partial Content", Content_Range="bytes 0-0/10")
        )
        self.assertEqual((await self.refused(server.url(), offset=5)).kind, "body")
        self.assertEqual((await self.refused(server.url())).http_status, 206)

    async def test_servers_that_close_after_each_answer(self) -> None:
        """U14: lookups go on over new connections."""

        def script(connection: Asked, request: str) -> None:
            connection.send(answer(request.split()[1].encode()))
            connection.close()

        server = Server(self, script)
        answers: dict[int, Answer] = {}
        await self.fetcher.lookup([server.url(f"/{n}") for n in range(40)], answers.__setitem__)
        expected = {number: b"/%d" % number for number in range(40)}
        self.assertEqual({number: each.body for number, each in answers.items()}, expected)

    async def test_servers_that_are_not_there(self) -> None:
        """Each lookup is answered, soon."""
        answers: dict[int, Answer] = {}
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            urls = [f"http://127.0.0.1:{port}/{number}" for number in range(50)]
            await self.fetcher.lookup([*urls, "file:///etc/passwd"], answers.__setitem__)
        self.assertEqual({a.kind for n, a in answers.items() if n < 50}, {"connect"})
        self.assertEqual((len(answers), answers[50].kind), (51, "url"))


class ConfinementTest(FetcherCase):
    async def test_local_files(self) -> None:
        """W22: not by URL, and the process has none at all."""
        canary = temporary_directory(self, world_readable=True) + "/canary"
        Path(canary).write_text("secret")
        server = Server(self, always(answer(b"x")))
        await self.fetch(server.url())
        self.assertEqual((await self.refused(f"file://{canary}")).kind, "url")
        if os.geteuid() == 0:
            root = f"/proc/{self.fetcher.pid}/root"
            self.assertFalse(os.path.exists(root + canary))
            self.assertEqual(os.listdir(root), ["etc"])
            self.assertEqual(os.statvfs(root).f_flag & os.ST_RDONLY, os.ST_RDONLY)

    async def test_a_stopped_process_is_replaced(self) -> None:
        await self.fetch(Server(self, always(answer(b"x"))).url())  # so that it runs
        self.patch(client, "SILENCE", 0.3)
        asked: Deferred[None] = Deferred()
        server = Server(self, lambda connection, _: asked.callback(None))
        running = Deferred.fromCoroutine(self.fetch(server.url()))
        await asked
        stopped = self.fetcher.pid
        # Without root this process only waits for the real one.
        children = Path(f"/proc/{stopped}/task/{stopped}/children").read_text().split()
        os.kill(int(children[0]) if children else stopped, signal.SIGSTOP)
        error = await self.assertFailure(running, FetchError)
        self.assertEqual(error.kind, "fetcher")
        self.patch(client, "SILENCE", 30.0)
        server.script = always(answer(b"again"))
        self.assertEqual((await self.fetch(server.url()))[0], b"again")
        self.assertNotEqual(self.fetcher.pid, stopped)

    async def test_other_name_servers(self) -> None:
        """A process that knows the old ones only is replaced, when it is idle."""
        file = temporary_directory(self) + "/resolv.conf"
        self.patch(spawning, "WATCHED", (file,))
        server = Server(self, always(answer(b"x")))
        await self.fetch(server.url())
        first = self.fetcher.pid
        await self.fetch(server.url())
        self.assertEqual(self.fetcher.pid, first)
        Path(file).touch()
        await self.fetch(server.url())
        self.assertNotEqual(self.fetcher.pid, first)
        await self.fetcher.stop()
        self.assertFalse(os.path.exists(f"/proc/{first}"))

    async def test_lookups_survive_it(self) -> None:
        """Those without an answer are asked again."""
        killed: list[int] = []

        def script(connection: Asked, request: str) -> None:
            if not killed:
                killed.append(self.fetcher.pid)
                os.kill(self.fetcher.pid, signal.SIGKILL)
            connection.send(answer(b"x"))

        server = Server(self, script)
        answers: dict[int, Answer] = {}
        await self.fetcher.lookup([server.url()] * 30, answers.__setitem__)
        self.assertEqual((len(answers), {a.body for a in answers.values()}), (30, {b"x"}))

    async def test_stopping(self) -> None:
        """All that runs fails, and nothing is left."""
        asked: Deferred[None] = Deferred()
        server = Server(self, lambda connection, _: asked.callback(None))
        running = Deferred.fromCoroutine(self.fetch(server.url()))
        await asked
        pid = self.fetcher.pid
        await self.fetcher.stop()
        await self.assertFailure(running, FetchError)
        self.assertFalse(os.path.exists(f"/proc/{pid}"))
        read, write = os.pipe()
        await self.assertFailure(self.fetcher.fetch(Request(server.url()), write), FetchError)
        self.assertEqual(os.read(read, 1), b"")
        os.close(read)


class SlowReaderTest(FetcherCase):
    def test_bombs_take_turns(self) -> None:
        """However much comes of a little, others have their turn (spec: substitutes §10.7)."""
        time, blocks = MemoryReactorClock(), list[bytes]()
        read_end, write_end = os.pipe()
        os.close(read_end)
        connections: Any = None
        request = Request("http://x/")
        transfer = Transfer(time, connections, Proxies(), request, write_end, print, print)
        self.addCleanup(transfer._sink.close)
        self.patch(transfer, "_codec", decoder("zstd"))
        self.patch(transfer._sink, "write", blocks.append)
        transfer._take(zstd.compress(bytes(30 << 20)))
        self.assertLess(sum(map(len, blocks)), 10 << 20)
        for _ in range(10):
            time.advance(0)
        self.assertEqual(sum(map(len, blocks)), 30 << 20)

    async def test_bombs_for_slow_readers(self) -> None:
        """No more is decoded than is read: memory stays constant (spec: substitutes §10.7)."""
        server = Server(self, always(answer(zstd.compress(bytes(1 << 30)))))
        read_end, write_end = os.pipe()
        self.addCleanup(os.close, read_end)
        began: Deferred[object] = Deferred()
        request = Request(server.url(), compression="zstd")
        fetching = self.fetcher.fetch(request, write_end, head=began.callback)
        await began
        answers: dict[int, Answer] = {}
        await self.fetcher.lookup([server.url()], answers.__setitem__)  # It has had its turn.
        status = Path(f"/proc/{self.fetcher.pid}/status").read_text()
        if os.geteuid() == 0:  # Without root this process only waits for the real one.
            resident = int(status.partition("VmHWM:")[2].split()[0])
            self.assertLess(resident, 200_000)
        fetching.cancel()
        await self.assertFailure(fetching, CancelledError)
