"""Fetching by FTP, from a real server and from one that does wrong (spec: downloads §4)."""

from __future__ import annotations

import os
from pathlib import Path

from twisted.cred.checkers import AllowAnonymousAccess, InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.portal import Portal
from twisted.internet import reactor
from twisted.protocols.ftp import FTPFactory, FTPRealm

from guixd.net.requests import Request
from tests.net.servers import Asked, FetcherCase, Server
from tests.support import temporary_directory


class _Lines(Asked):
    """A server whose script gets each line."""

    def connectionMade(self) -> None:
        super().connectionMade()
        self.server.script(self, "")

    def dataReceived(self, data: bytes) -> None:
        for line in data.decode().splitlines():
            self.server.requests.append(line)
            self.server.script(self, line)


class _LineServer(Server):
    def buildProtocol(self, addr: object) -> Asked:
        return _Lines(self)


class FtpTest(FetcherCase):
    def setUp(self) -> None:
        super().setUp()
        directory = temporary_directory(self)
        self.content = os.urandom(500_000)
        Path(directory, "file name").write_bytes(self.content)
        portal = Portal(FTPRealm(directory, directory))
        portal.registerChecker(AllowAnonymousAccess())
        users = InMemoryUsernamePasswordDatabaseDontUse(me=b"secret")
        portal.registerChecker(users)
        port = reactor.listenTCP(0, FTPFactory(portal), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        self.where = f"127.0.0.1:{port.getHost().port}"

    async def test_files(self) -> None:
        body, fetched = await self.fetch(f"ftp://{self.where}/file%20name")
        self.assertEqual(body, self.content)
        self.assertEqual(fetched.head.size, len(self.content))
        self.assertEqual(Request("").schemes, ("http", "https", "ftp"))

    async def test_what_fails(self) -> None:
        """W8"""
        for path, kind in (("/nothing", "http"), ("/a%0d%0aDELE%20b", "url")):
            error = await self.refused(f"ftp://{self.where}{path}")
            self.assertEqual(error.kind, kind, error.text)
        error = await self.refused(f"ftp://me:wrong@{self.where}/file")
        self.assertEqual(error.http_status, 530)
        self.assertNotIn("wrong", error.text)

    async def test_servers_that_do_wrong(self) -> None:
        """W8: they say nothing, nonsense, too much, or close."""
        for reply in ("nonsense\r\n" * 2000, "x" * 10_000, "220-\r\n" * 2000, "421 no\r\n"):

            def script(connection: Asked, line: str, reply: str = reply) -> None:
                connection.send(reply.encode())

            server = _LineServer(self, script)
            error = await self.refused(f"ftp://127.0.0.1:{server.number}/x", idle_timeout=5)
            self.assertIn(error.kind, ("body", "http"))
        silent = _LineServer(self, lambda connection, line: None)
        url = f"ftp://127.0.0.1:{silent.number}/x"
        self.assertEqual((await self.refused(url, idle_timeout=0.2)).kind, "timeout")
        await silent.connections[0].closed
