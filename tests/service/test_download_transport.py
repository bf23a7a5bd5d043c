"""Downloads over bad connections, TLS and proxies, through the whole daemon."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from guixd.testing import TemporaryDaemon
from tests.net.servers import Asked, Server, always, answer
from tests.net.test_proxies import TinyProxy, TlsServer
from tests.service.downloads import CONTENT, DownloadCase


class BrokenTest(DownloadCase):
    async def test_broken_transfers_are_taken_up_again(self) -> None:
        """W8: with Range and If-Range, as often as something comes."""

        def script(connection: Asked, request: str) -> None:
            begin = int(request.partition("bytes=")[2].partition("-")[0] or 0)
            status = "206 Partial Content" if begin else "200 OK"
            left = len(CONTENT) - begin
            where = f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}"
            fields = {"ETag": '"x"', "Content_Range": where}
            part = CONTENT[begin : begin + 5]
            connection.send(answer(part, status=status, length=left, **fields))
            if left > 5:
                connection.close()

        server = Server(self, script)
        client = await self.client()
        drv, out = await self.derive(client, f'"{server.url()}"')
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)
        self.assertEqual(len(server.requests), 3)
        self.assertIn('If-Range: "x"', server.requests[1])

    async def test_short_bodies(self) -> None:
        """W8: each is fetched anew a few times, be it so short that nothing of it was written."""

        def script(connection: Asked, _: str) -> None:
            connection.send(answer(b"w", length=100))
            connection.close()

        server = Server(self, script)
        client = await self.client()
        drv, _ = await self.derive(client, f'"{server.url()}"')
        self.assertEqual((await self.failure(client, drv))[0], 1)
        self.assertEqual(len(server.requests), 3)

    async def test_what_changed_meanwhile_is_fetched_anew(self) -> None:
        """W8"""

        def script(connection: Asked, _: str) -> None:
            if len(server.requests) == 1:
                connection.send(answer(b"something else", length=100, ETag='"old"'))
                connection.close()
            else:
                connection.send(answer(CONTENT, ETag='"new"'))

        server = Server(self, script)
        client = await self.client()
        drv, out = await self.derive(client, f'"{server.url()}"')
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)

    async def test_the_fetcher_dies(self) -> None:
        """The download goes on with another one."""

        def script(connection: Asked, _: str) -> None:
            if len(server.requests) == 1:
                os.kill(self.daemon.service.daemon.fetcher.pid, signal.SIGKILL)
            else:
                connection.send(answer(CONTENT))

        server = Server(self, script)
        client = await self.client()
        drv, out = await self.derive(client, f'"{server.url()}"')
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)


class TlsTest(DownloadCase):
    async def test_unknown_certificates(self) -> None:
        """W11, W13: good enough for what is known by its hash, but not for passwords."""
        server = TlsServer(self, always(answer(CONTENT)))
        client = await self.client()
        drv, out = await self.derive(client, f'"{server.https()}"')
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)
        drv, out = await self.derive(client, f'"{server.https("me:secret@")}"', name="x")
        status, text = await self.failure(client, drv)
        self.assertEqual(status, 1)
        self.assertIn("no password is sent", text)
        self.assertNotIn("secret", text)
        self.assertEqual(len(server.requests), 1)


class ProxyTest(DownloadCase):
    def make(self, **options: object) -> TemporaryDaemon:
        self.proxy = TinyProxy(self, "me secret")
        where = f"http://me:secret@127.0.0.1:{self.proxy.port}"
        self.environ = {"http_proxy": where, "https_proxy": where}
        return super().make(**options)

    async def test_proxies_of_the_daemon(self) -> None:
        """W12"""
        server = TlsServer(self, always(answer(CONTENT)))
        client = await self.client()
        for name, url in (("a", server.url()), ("b", server.https())):
            drv, out = await self.derive(client, f'"{url}"', name=name, impureEnvVars="http_proxy")
            await client.build_paths([drv])
            self.assertEqual(Path(out).read_bytes(), CONTENT)
        self.assertIn("CONNECT localhost", self.proxy.log)
        server.script = always(answer(status="407 Proxy Authentication Required"))
        drv, _ = await self.derive(client, f'"{server.url()}"', name="c")
        status, text = await self.failure(client, drv)
        self.assertEqual(status, 1)
        self.assertIn("wants a user name and password", text)
        self.assertNotIn("secret", text)
