"""A daemon that fetches what clients name from public addresses only (spec: downloads §8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guixd.testing import TemporaryDaemon
from tests.net.servers import Server, always, answer
from tests.service.downloads import CONTENT, quoted
from tests.service.substitutes import SubstituteCase

SPELLINGS = ("127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1")


class PrivateHostsTest(SubstituteCase):
    """All servers are here, so that none may be asked unless the daemon names it."""

    def make(self, **options: Any) -> TemporaryDaemon:
        self.own = Server(self, self.respond)
        urls = (self.own.url("/own/"),)
        return super().make(**options, refuse_private_hosts=True, substitute_urls=urls)

    async def test_downloads(self) -> None:
        """W10: however it is spelled, nothing is connected to."""
        server = Server(self, always(answer(CONTENT)))
        client = await self.client(urls="")
        urls = [f"{scheme}://{h}:{server.number}/" for scheme in ("http", "ftp") for h in SPELLINGS]
        urls += ["http://10.0.0.1/", "http://169.254.169.254/", "http://[fd00::1]/"]
        drv, _ = await self.derive(client, quoted(*urls), download_methods="(upstream)")
        status, text = await self.failure(client, drv)
        self.assertEqual(status, 1)
        self.assertEqual(text.count(", which is not connected to"), len(urls), text)
        self.assertEqual(server.connections, [])

    async def test_servers_of_clients(self) -> None:
        """U16: servers that only clients name; those of the daemon may be here."""
        path = self.offer("item")
        for host in SPELLINGS:
            client = await self.client(urls=f"http://{host}:{self.server.number}")
            self.assertFalse(await client.has_substitutes(path))
            self.assertIn("which is not connected to", self.text())
        self.assertEqual(self.server.connections, [])
        self.answers = {f"/own{name}": data for name, data in self.answers.items()}
        near = await self.client(urls=self.own.url(""))  # another one, of the same host
        self.assertFalse(await near.has_substitutes(path))
        client = await self.client(urls=f"{self.url} {self.own.url('/own')}")
        await client.build_paths([path])
        self.assertTrue(Path(path).exists())
        self.assertEqual(self.server.connections, [])

    async def test_discovered(self) -> None:
        """U25: what was found in the local network is there."""
        path = self.offer("item")
        published = Path(self.directory, "var/discover/publish")
        published.parent.mkdir(parents=True, exist_ok=True)
        published.write_text(f"{self.url}\n")
        client = await self.client(urls="", discover="true")
        await client.build_paths([path])
        self.assertTrue(await client.is_valid_path(path))
