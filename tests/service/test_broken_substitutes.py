"""Substitutes from servers that break off, stall and drip, through the whole daemon (U11, U12)."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

from twisted.internet.defer import Deferred

from guixd.build import transfer
from guixd.build.request import BuildMode
from guixd.client import Client
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from guixd.store import incoming
from tests.net.servers import Asked, Server, always, answer, drip, in_pieces
from tests.service.substitutes import SubstituteCase

CONTENT = os.urandom(50_000)
NAR = nar_of_file(CONTENT)
TAG = {"ETag": '"one"'}


class BrokenTransfers(SubstituteCase):
    async def prepared(self, script: Callable[[Asked, str], None], **said: str) -> StorePath:
        """Let the server have an item and serve its archive by SCRIPT."""
        path = self.offer("item", CONTENT, **said)
        self.answers[f"/nar/{path.base}"] = script
        return path

    def another(self, path: StorePath) -> Server:
        """Return another server that has the same without trouble."""

        def script(connection: Asked, request: str) -> None:
            connection.send(answer(self.narinfo(path, NAR) if "narinfo" in request else NAR))

        return Server(self, script)

    async def comes(self, path: StorePath, client: Client) -> list[str]:
        """Build PATH, which works; return the traces."""
        await client.build_paths([path])
        self.assertEqual(Path(path).read_bytes(), CONTENT)
        self.assertEqual(self.leftovers(), [])
        return [line for line in self.text().split("\n") if line.startswith("@ ")]

    async def test_goes_on(self) -> None:
        """U11: a compressed archive goes on where it broke off; nothing is at its name before."""
        data = gzip.compress(NAR)
        there: list[bool] = []
        pieces = in_pieces(data, 20_000, Asked.close, **TAG)

        def script(connection: Asked, request: str) -> None:
            there.append(os.path.lexists(path))
            pieces(connection, request)

        path = await self.prepared(script, compression="gzip")
        client = await self.client(print_extended_build_trace="1")
        traces = await self.comes(path, client)
        self.assertEqual(there, [False] * 3)
        self.assertEqual(self.asked("/nar/"), 3)
        self.assertEqual(len([line for line in traces if "download-started" in line]), 1)
        done = [int(line.split()[-1]) for line in traces if "download-progress" in line]
        self.assertEqual((done, done[-1]), (sorted(done), len(data)))

    async def test_another_server(self) -> None:
        """U11, U12: what cannot go on, stalls or drips is taken from another server."""
        self.patch(transfer, "IDLE_TIMEOUT", 0.3)

        def stall(_: Asked) -> None:
            pass

        for breaks in (Asked.close, Asked.reset, stall, drip):
            path = await self.prepared(in_pieces(NAR, 500, breaks))
            other = self.another(path)
            client = await self.client(urls=f"{self.url} {other.url('')}")
            await self.comes(path, client)
            self.assertEqual(len([r for r in other.requests if "/nar/" in r]), 1)
            await client.collect_garbage(3, [path])
            await client.close()

    async def test_servers_of_others(self) -> None:
        """U11, U21: a server that stalls is in the way of those only who name it."""
        begun: Deferred[Asked] = Deferred()
        path = await self.prepared(lambda connection, _: begun.callback(connection))
        first = await self.client()
        waiting = first.build_paths([path])
        stalled = await begun
        other = self.another(path)
        await self.comes(path, await self.client(urls=other.url("")))
        await waiting
        await stalled.closed
        self.assertTrue(await first.is_valid_path(path))

    async def test_same_server_again(self) -> None:
        """U11, U14: without another place, it is tried once more from the beginning."""

        def without_length(connection: Asked, _: str) -> None:
            connection.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + NAR[:500])
            connection.close()

        for broken in in_pieces(NAR, 500, Asked.close), without_length:
            tries = [broken, always(answer(NAR))]
            path = await self.prepared(lambda *asked, tries=tries: tries.pop(0)(*asked))
            client = await self.client()
            traces = await self.comes(path, client)
            self.assertNotIn("mismatch", "".join(traces))
            await client.collect_garbage(3, [path])
            await client.close()

    async def test_another_archive_meanwhile(self) -> None:
        """U10, U11: what goes on with other data is not taken for the right one."""
        first = in_pieces(NAR, 500, Asked.close, **TAG)
        second = in_pieces(NAR[:-1000] + bytes(1000), len(NAR), Asked.close, **TAG)
        path = await self.prepared(
            lambda connection, request: (second if "Range:" in request else first)(
                connection, request
            )
        )
        client = await self.client()
        await self.fails(client.build_paths([path]))
        self.assertFalse(await client.is_valid_path(path))
        self.assertNothing(path)

    async def test_no_exchange(self) -> None:
        """U19: what is damaged is replaced also where two files cannot change places at once."""
        self.patch(incoming, "exchange", lambda *names: False)
        path = await self.prepared(always(answer(NAR)))
        client = await self.client()
        await self.comes(path, client)
        os.chmod(path, 0o644)
        Path(path).write_bytes(b"damaged")
        await client.build_paths([path], BuildMode.REPAIR)
        self.assertEqual(Path(path).read_bytes(), CONTENT)
        self.assertEqual(self.leftovers(), [])

    async def test_never_whole(self) -> None:
        """U11: a server that always breaks off is given up, and nothing is left."""
        self.patch(transfer, "IDLE_TIMEOUT", 0.1)
        for breaks in (Asked.close, drip):
            path = await self.prepared(in_pieces(NAR, 500, breaks, **TAG))
            client = await self.client()
            await self.fails(client.build_paths([path]))
            self.assertFalse(await client.is_valid_path(path))
            self.assertNothing(path)
