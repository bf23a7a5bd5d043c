"""Bodies between the fetcher and who wants them, when the fetcher has done its part (W8)."""

from __future__ import annotations

import threading
from typing import Any

from twisted.internet import reactor, threads
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import TestCase

from guixd.net.receiving import receive
from guixd.net.requests import Fetched, Request
from guixd.testing import FakeFetcher

URL = "http://server/x"


class LastPieceTest(TestCase):
    """All is in the pipe, and is not consumed yet."""

    def receive(self, consume: Any) -> Deferred[Fetched]:
        fetcher = FakeFetcher({URL: b"body"})
        return Deferred.fromCoroutine(
            receive(reactor, threads.deferToThread, fetcher, Request(URL), consume)
        )

    async def test_refused(self) -> None:
        """What refuses the last piece is the failure; the body is not taken for complete."""

        def refuse(_: bytes) -> None:
            raise ZeroDivisionError

        await self.assertFailure(self.receive(refuse), ZeroDivisionError)

    async def test_given_up(self) -> None:
        """Who gives up now is told just that, and nothing is consumed any more."""
        pieces: list[bytes] = []
        receiving = self.receive(pieces.append)
        receiving.cancel()
        await self.assertFailure(receiving, CancelledError)
        self.assertEqual(pieces, [])

    async def test_given_up_twice(self) -> None:
        """While a thread consumes, the end is awaited, also by who gives up again."""
        begun: Deferred[None] = Deferred()
        go = threading.Event()
        fetcher = FakeFetcher({URL: bytes(32 << 10)})
        pieces: list[int] = []

        def consume(data: bytes) -> None:
            reactor.callFromThread(begun.callback, None)
            go.wait(20)
            pieces.append(len(data))

        receiving = Deferred.fromCoroutine(
            receive(reactor, threads.deferToThread, fetcher, Request(URL), consume)
        )
        await begun
        receiving.cancel()
        receiving.cancel()
        self.assertNoResult(receiving)
        go.set()
        await self.assertFailure(receiving, CancelledError)
        self.assertEqual(len(pieces), 1)
