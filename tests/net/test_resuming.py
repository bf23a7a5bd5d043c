"""Bodies that break off, and go on or not (spec: downloads §4, substitutes §7; W8, U11)."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable

from backports import zstd

from tests.net.servers import Asked, FetcherCase, Server, answer, drip, in_pieces

CONTENT = os.urandom(40_000) + bytes(400_000)
TAG = {"ETag": '"one"'}


def stall(_: Asked) -> None:
    """Say nothing any more."""


def reset_the_second(connection: Asked) -> None:
    """Close, but for the second connection, of which nothing may arrive."""
    (connection.reset if len(connection.server.requests) == 2 else connection.close)()


class GoesOnTest(FetcherCase):
    """The server still has the same."""

    async def test_however_it_breaks(self) -> None:
        """W8, U11: closed, reset and stalled; what was decoded goes on."""
        compressed = {
            "none": CONTENT,
            "gzip": gzip.compress(CONTENT),
            "zstd": zstd.compress(CONTENT),
        }
        for compression, data in compressed.items():
            for breaks in (Asked.close, reset_the_second, stall):
                server = Server(self, in_pieces(data, len(data) // 3, breaks, **TAG))
                body, fetched = await self.fetch(
                    server.url(), compression=compression, resumptions=5, idle_timeout=0.3
                )
                self.assertEqual(body, CONTENT)
                self.assertEqual((fetched.received, fetched.written), (len(data), len(CONTENT)))
                offsets = [head.offset for head in self.heads]
                self.assertEqual((offsets[0], self.heads[0].size), (0, len(data)))
                self.assertEqual(offsets, sorted(offsets))
                self.assertGreaterEqual(len(offsets), 3)
                again = server.requests[1:]
                for offset in offsets[1:]:
                    self.assertTrue([r for r in again if f"Range: bytes={offset}-\r\n" in r])
                self.assertTrue(all('If-Range: "one"' in request for request in again))

    async def test_dates(self) -> None:
        """W8: a date will do, too."""
        fields = {"Last_Modified": "Tue, 01 Sep 2020 10:00:00 GMT"}
        server = Server(self, in_pieces(CONTENT, 300_000, Asked.close, **fields))
        body, _ = await self.fetch(server.url(), resumptions=1)
        self.assertEqual(body, CONTENT)
        self.assertIn("If-Range: Tue, 01 Sep 2020 10:00:00 GMT", server.requests[1])


class EndsTest(FetcherCase):
    """Going on is not possible, or not worth it."""

    async def broken(self, script: Callable[[Asked, str], None], requests: int) -> str:
        """Fetch from SCRIPT, which fails after some REQUESTS; return the text."""
        server = Server(self, script)
        error = await self.refused(server.url(), resumptions=5, idle_timeout=0.3, least=1000)
        self.assertIn(error.kind, ("body", "timeout"))
        self.assertEqual(len(server.requests), requests)
        return str(error.text)

    async def test_not_known_to_be_the_same(self) -> None:
        """W8: without a tag or a date, or with a weak one, nothing is asked again."""
        for fields in {}, {"ETag": 'W/"one"'}:
            await self.broken(in_pieces(CONTENT, 100, Asked.close, **fields), 1)

    async def test_another_file(self) -> None:
        """W8: the server has another file now, or sends another part."""
        first = in_pieces(CONTENT, 100_000, Asked.close, **TAG)
        whole = answer(b"other" * 1000, ETag='"two"')
        wrong = answer(b"other", "206 Partial Content", Content_Range="bytes 7-11/12", **TAG)
        for then, text in (whole, "another file"), (wrong, "another part"):

            def script(connection: Asked, request: str, then: bytes = then) -> None:
                if "Range:" in request:
                    connection.send(then)
                else:
                    first(connection, request)

            self.assertIn(text, await self.broken(script, 2))

    async def test_nothing_more_there(self) -> None:
        """W8: the server has no such part, so what came is wrong, and all is fetched anew."""
        first = in_pieces(CONTENT, 1000, Asked.close, **TAG)
        none = answer(status="416 No")

        def script(connection: Asked, request: str) -> None:
            connection.send(none) if "Range:" in request else first(connection, request)

        self.assertIn("closed before", await self.broken(script, 2))

    async def test_less_than_promised(self) -> None:
        """W8: a part that is complete, but ends before the file does."""

        def script(connection: Asked, request: str) -> None:
            begin = int(request.partition("bytes=")[2].partition("-")[0] or 0)
            part = CONTENT[begin : begin + 200_000]
            where = {"Content_Range": f"bytes {begin}-{begin + len(part) - 1}/{len(CONTENT)}"}
            if begin:
                connection.send(answer(part, "206 Partial Content", **where, **TAG))
            else:
                connection.send(answer(part, length=len(CONTENT), **TAG))
                connection.close()

        server = Server(self, script)
        self.assertEqual((await self.fetch(server.url(), resumptions=5))[0], CONTENT)
        self.assertEqual((await self.refused(server.url(), resumptions=1)).kind, "body")

    async def test_not_for_ever(self) -> None:
        """U11: a few times at most, and never if nothing has come."""
        await self.broken(in_pieces(CONTENT, 1000, Asked.close, **TAG), 6)
        await self.broken(in_pieces(CONTENT, 0, Asked.close, **TAG), 1)

    async def test_what_cannot_be_decoded(self) -> None:
        """W8: wrong data is not asked for again."""
        data = gzip.compress(os.urandom(200_000))
        data = data[:1000] + bytes(1000) + data[2000:]
        server = Server(self, in_pieces(data, len(data), stall, **TAG))
        error = await self.refused(server.url(), compression="gzip", resumptions=5)
        self.assertEqual(error.kind, "body")
        self.assertEqual(len(server.requests), 1)

    async def test_dripping(self) -> None:
        """U11: a server that sends next to nothing is as bad as one that sends nothing."""
        text = await self.broken(in_pieces(CONTENT, 10, drip), 1)
        self.assertIn("no more than", text)
