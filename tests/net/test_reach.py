"""Servers elsewhere that lead here, in all spellings (W10; substitutes §10.4)."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from twisted.cred.checkers import AllowAnonymousAccess
from twisted.cred.portal import Portal
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHostnameResolver, IHostResolution
from twisted.internet.task import Clock, deferLater
from twisted.protocols.ftp import FTPFactory, FTPRealm
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer

from guixd.errors import FetchError
from guixd.net import connections, reach
from guixd.net.connections import Connections
from guixd.net.lookups import Lookups
from guixd.net.proxies import Proxies
from guixd.net.reach import Reach, reach_of, reach_of_host
from guixd.net.requests import Answer, Request
from guixd.net.transfers import Transfer
from tests.net.servers import Asked, Server, always, answer
from tests.support import temporary_directory

HERE = (
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "0.1.2.3", "::1", "::", "::ffff:127.0.0.1",
    "::ffff:0.0.0.0", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
)  # fmt: skip
NEAR = ("169.254.169.254", "fe80::1", "fe80::1%eth0", "::ffff:169.254.1.1", "224.0.0.1", "ff02::1")
INSIDE = (
    "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "255.255.255.255",
    "fd00::1", "fec0::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "198.18.0.1", "240.0.0.1",
)  # fmt: skip
ELSEWHERE = ("9.9.9.9", "172.32.0.1", "2a00::1", "::ffff:9.9.9.9", "64:ff9b::909:909")
SPELLINGS = (
    "127.0.0.1", "localhost", "LOCALHOST", "127.1", "2130706433", "0x7f000001", "0x7F.1",
    "017700000001", "0177.0.0.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
    "[0:0:0:0:0:0:0:1]", "here.test",
)  # fmt: skip


class ReachTest(SynchronousTestCase):
    def test_addresses(self) -> None:
        """Whatever form an address has."""
        expected = {
            **dict.fromkeys(HERE, Reach.LOOPBACK),
            **dict.fromkeys(NEAR, Reach.LINK),
            **dict.fromkeys(INSIDE, Reach.PRIVATE),
            **dict.fromkeys(ELSEWHERE, Reach.WORLD),
        }
        self.assertEqual({address: reach_of(address) for address in expected}, expected)
        self.assertEqual(reach_of("name.test"), Reach.LOOPBACK)  # which is never connected to

    def test_names(self) -> None:
        """What is written in a URL, as far as that tells."""
        for host in SPELLINGS[:-1]:
            self.assertEqual(reach_of_host(host.strip("[]")), Reach.LOOPBACK, host)
        for host in ("localhost.", "a.localhost", "127.0.0.1."):
            self.assertEqual(reach_of_host(host), Reach.LOOPBACK, host)
        for host in (
            "example.org",
            "127.0.0.1.example.org",
            "ffff",
            "0xfeed.example",
            "localhosts",
        ):
            self.assertEqual(reach_of_host(host), Reach.WORLD, host)


@implementer(IHostnameResolver, IHostResolution)
class Names:
    """Knows some names, each with its addresses in turn; asks REAL for others."""

    def __init__(self, real: Any, **known: list[str]) -> None:
        self._real = real
        self.known = known
        self.name = ""

    def resolveHostName(
        self, receiver: Any, hostName: str, portNumber: int = 0, *rest: Any, **named: Any
    ) -> Any:
        label, _, zone = hostName.partition(".")
        if zone != "test":
            return self._real.resolveHostName(receiver, hostName, portNumber, *rest, **named)
        addresses = self.known[label]
        found = addresses.pop(0) if len(addresses) > 1 else addresses[0]
        receiver.resolutionBegan(self)
        receiver.addressResolved(IPv4Address("TCP", found, portNumber))
        receiver.resolutionComplete()
        return self

    def cancel(self) -> None:
        """There is nothing to wait for."""


class Redirected(TestCase):
    """127.0.0.2 plays a server elsewhere; the one at 127.0.0.1 must never hear of it."""

    timeout = 30

    def setUp(self) -> None:
        def seen(address: str) -> Reach:
            return Reach.WORLD if address == "127.0.0.2" else reach_of(address)

        self.patch(reach, "reach_of", seen)
        self.patch(connections, "reach_of", seen)
        self.names = Names(reactor.nameResolver, here=["127.0.0.1"])
        self.addCleanup(reactor.installNameResolver, reactor.installNameResolver(self.names))
        self.victim = Server(self, always(answer(b"secret")))
        try:
            second = reactor.listenTCP(self.victim.number, self.victim, interface="::1")
        except OSError:  # without IPv6 there is nothing to protect there
            pass
        else:
            self.addCleanup(second.stopListening)
        self.target = ""
        self.server = Server(self, self.lead, "127.0.0.2")
        self.connections = Connections(reactor, lambda: None)
        self.addCleanup(self.connections.close)

    def lead(self, connection: Asked, request: str) -> None:
        connection.send(answer(status="302 Found", Location=self.target))

    async def fetch(self, url: str, proxies: Proxies | None = None, **fields: Any) -> bytes:
        """Return the body of URL, or raise `FetchError`."""
        read_end, write_end = os.pipe()
        with os.fdopen(read_end, "rb") as reading:
            await Transfer(
                reactor,
                self.connections,
                proxies or Proxies(),
                Request(url, **fields),
                write_end,
                lambda head: None,
                lambda received: None,
            ).run()
            await deferLater(reactor, 0)  # The connection can be kept now.
            return reading.read()

    async def look_up(self, url: str, nearest: Reach = Reach.LOOPBACK) -> Answer:
        lookups = Lookups(Clock(), self.connections, Proxies())
        got: Deferred[Answer] = Deferred()
        lookups.ask([url], {}, False, lambda _, found: got.callback(found), nearest)
        found = await got
        await deferLater(reactor, 0)
        return found

    async def refused(self, url: str, **fields: Any) -> str:
        """Return the kind of the error that fetching URL ends with."""
        try:
            await self.fetch(url, **fields)
        except FetchError as error:
            return error.kind
        raise AssertionError(f"{url} was fetched")

    def spelled(self, host: str) -> str:
        return f"http://{host}:{self.victim.number}/"

    async def test_to_here(self) -> None:
        """W10: no spelling leads here from elsewhere, for bodies nor for narinfos."""
        for host in SPELLINGS:
            self.target = self.spelled(host)
            try:
                self.assertEqual(await self.fetch(self.target), b"secret")  # if it is asked for
            except FetchError:
                if host.startswith("[") and not socket.has_ipv6:
                    continue
                raise
            asked = len(self.victim.requests)
            connected = len(self.victim.connections)
            self.assertEqual(await self.refused(self.server.url()), "redirect", host)
            self.assertEqual((await self.look_up(self.server.url())).kind, "address", host)
            self.assertEqual(await self.refused(self.target, nearest=Reach.PRIVATE), "address")
            self.assertEqual(len(self.victim.requests), asked, host)
            self.assertEqual(len(self.victim.connections), connected, host)

    async def test_to_the_link(self) -> None:
        """W10: nor to this wire, where clouds have their secrets."""
        for host in ("169.254.169.254", "[fe80::1]", "0xa9fea9fe", "2852039166"):
            self.target = f"http://{host}/latest/meta-data"
            self.assertEqual(await self.refused(self.server.url()), "redirect", host)
            self.target = self.target.replace("http:", "ftp:")
            self.assertEqual(await self.refused(self.server.url()), "redirect", host)

    async def test_other_meanings(self) -> None:
        """W10: it counts what a name means when it is connected to."""
        self.names.known["turns"] = ["127.0.0.2", "127.0.0.1"]
        self.target = "/again"
        turns = f"http://turns.test:{self.victim.number}/"
        self.names.known["away"] = ["127.0.0.2"]

        def lead(connection: Asked, request: str) -> None:
            connection.send(answer(status="302 Found", Location=turns))
            connection.close()

        self.server.script = lead
        away = f"http://away.test:{self.server.number}/"
        error = await self.assertFailure(
            Deferred.fromCoroutine(self.fetch(away, redirects=1, connect_timeout=1.0)), FetchError
        )
        self.assertEqual(error.kind, "connect")  # nobody there, where it first leads
        self.assertEqual(await self.refused(away), "redirect")
        self.assertEqual(self.victim.connections, [])

    async def test_connections_that_were_kept(self) -> None:
        """W10: one that is open already, as somebody may, is not for who may not."""
        self.target = self.spelled("here.test")
        self.assertEqual(await self.fetch(self.target), b"secret")
        self.assertEqual(await self.fetch(self.target), b"secret")
        self.assertEqual(len(self.victim.connections), 1)
        self.assertEqual(await self.refused(self.server.url()), "redirect")
        self.assertEqual((await self.look_up(self.server.url())).kind, "address")
        self.assertEqual(len(self.victim.requests), 2)

    async def test_by_way_of_here(self) -> None:
        """W10: who was elsewhere once stays so; a server of this machine may lead anywhere."""
        self.target = self.victim.url()
        first = Server(self, always(answer(status="302 Found", Location=self.server.url())))
        self.assertEqual(await self.refused(first.url()), "redirect")
        first.script = always(answer(status="302 Found", Location=self.victim.url()))
        self.assertEqual(await self.fetch(first.url()), b"secret")
        self.assertEqual((await self.look_up(first.url())).body, b"secret")
        self.assertEqual(len(self.victim.requests), 2)

    async def test_proxies(self) -> None:
        """W10: a proxy may be here; and it is not led here, as far as the name tells."""
        proxy = Server(self, self.lead)
        proxies = Proxies(http=f"http://127.0.0.1:{proxy.number}")
        for host in SPELLINGS[:-1]:
            self.target = self.spelled(host)
            self.assertEqual(await self.refused("http://away.test/", proxies=proxies), "redirect")
        self.assertEqual(len(proxy.requests), len(SPELLINGS) - 1)

        def script(connection: Asked, request: str) -> None:
            if "away" in request:
                connection.send(answer(status="302 Found", Location="http://other.test/"))
            else:
                connection.send(answer(b"good"))

        proxy.script = script
        self.assertEqual(await self.fetch("http://away.test/", proxies=proxies), b"good")

    async def test_files_by_ftp(self) -> None:
        """W10: the file comes from where the commands go, whatever the name means by now."""
        directory = temporary_directory(self)
        Path(directory, "file").write_bytes(b"content")
        portal = Portal(FTPRealm(directory, directory), [AllowAnonymousAccess()])
        port = reactor.listenTCP(0, FTPFactory(portal), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        self.names.known["turns"] = ["127.0.0.1", "127.0.0.9"]
        url = f"ftp://turns.test:{port.getHost().port}/file"
        self.assertEqual(await self.fetch(url), b"content")
        self.target = f"ftp://here.test:{port.getHost().port}/file"
        self.assertEqual(await self.refused(self.server.url()), "redirect")
