"""Servers in the local network (spec: substitutes §11)."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import DeferredQueue
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from guixd.net import browser, discovery
from guixd.net.announced import (
    MOST_AT_ADDRESS,
    MOST_SERVERS,
    Announced,
    Server,
    read_servers,
)
from guixd.net.discovery import Discovery
from tests.net.lan import Machine, announce, connect, requires_lan

INTERFACES = [
    IPv4Interface(text) for text in ("127.0.0.1/8", "10.9.0.1/24", "172.17.0.1/16", "10.8.0.1/31")
]


def addresses(*texts: str) -> list[IPv4Address]:
    return [IPv4Address(text) for text in texts]


class AnnouncedTests(SynchronousTestCase):
    """U25: which announcements are believed."""

    def setUp(self) -> None:
        self.announced = Announced(INTERFACES)

    def announce(self, name: str, addresses: list[IPv4Address], port: int) -> bool:
        """Do what is done for an announcement; return whether there is such a server now."""
        server = self.announced.place(name, addresses, port)
        if server is None:
            self.announced.withdraw(name)
            return False
        taken = self.announced.take(name, server)
        self.assertIs(self.announced.has(name, server), taken)
        return taken

    def urls(self) -> list[str]:
        return [server.url for server in self.announced.servers]

    def test_where_servers_may_be(self) -> None:
        """In a network of this machine, but not at this machine itself."""
        for text in (
            *("127.0.0.1", "127.9.9.9", "0.0.0.0", "224.0.0.251", "255.255.255.255"),
            *("10.9.0.1", "172.17.0.1", "10.8.0.1", "10.9.0.0", "10.9.0.255", "10.9.1.1"),
            *("192.0.2.1", "169.254.1.1", "240.0.0.1"),
        ):
            self.assertFalse(self.announce(text, addresses(text), 80), text)
        self.assertEqual(self.urls(), [])
        for text in ("10.9.0.2", "172.17.255.254", "10.8.0.0"):
            self.assertTrue(self.announce(text, addresses(text), 80), text)

    def test_first_address(self) -> None:
        """The first one that will do stays until it is not announced any more."""
        for order, port, url in (
            ("192.0.2.1 172.17.0.1 10.9.0.3 10.9.0.2", 80, "10.9.0.3:80"),
            ("10.9.0.2 10.9.0.3", 81, "10.9.0.3:81"),
            ("10.9.0.2", 81, "10.9.0.2:81"),
        ):
            self.assertTrue(self.announce("a", addresses(*order.split()), port))
            self.assertEqual(self.urls(), [f"http://{url}"])
        self.assertFalse(self.announce("a", [], 81))
        self.assertEqual(self.urls(), [])

    def test_ports(self) -> None:
        for port in (0, -1, 1 << 16, 1 << 40):
            self.assertFalse(self.announce("a", addresses("10.9.0.2"), port))
        self.assertEqual(self.urls(), [])

    def test_numbers(self) -> None:
        """Neither one machine nor many can make the list long."""
        for port in range(1, 100):
            self.announce(f"a{port}", addresses("10.9.0.2"), port)
        self.assertEqual(len(self.urls()), MOST_AT_ADDRESS)
        for number in range(3, 3 + 2 * MOST_SERVERS):
            self.announce(f"b{number}", [IPv4Address("172.17.1.0") + number], 80)
        self.assertEqual(len(self.urls()), MOST_SERVERS)
        self.announced.withdraw("a1")
        self.announced.withdraw("a1")
        for name in ("c", "d"):
            self.announce(name, addresses("10.9.0.2"), 500)
        self.assertIn("http://10.9.0.2:500", self.urls())
        self.assertEqual(len(self.urls()), MOST_SERVERS)

    def test_once(self) -> None:
        """One server with several names is one."""
        for name in "ab":
            self.announce(name, addresses("10.9.0.2"), 80)
        self.assertEqual(self.urls(), ["http://10.9.0.2:80"])
        self.announced.withdraw("a")
        self.assertEqual(self.urls(), ["http://10.9.0.2:80"])

    def test_what_is_told(self) -> None:
        """The process that browses may have been taken over."""
        self.assertEqual(read_servers([["10.9.0.2", 80]]), (Server(IPv4Address("10.9.0.2"), 80),))
        wrong: list[Any] = [
            *(["10.9.0.2\nhttp://x", 80], ["x", 80], [1, 80], ["10.9.0.2", "80"]),
            *(["10.9.0.2", 0], ["10.9.0.2", True], ["10.9.0.2", 80.5], ["::1", 80]),
            *(["10.9.0.2"], ["10.9.0.2", 80, 1], 5),
        ]
        for pair in wrong:
            self.assertRaises((ValueError, TypeError), read_servers, [pair])
        many = [["10.9.0.2", 80]] * (MOST_SERVERS + 1)
        self.assertRaises(ValueError, read_servers, many)


class AnsweringTests(SynchronousTestCase):
    """U25: servers that are announced must be there."""

    def test_answers(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            there = Server(IPv4Address("127.0.0.1"), listening.getsockname()[1])
            self.assertTrue(asyncio.run(browser._answers(there)))
        self.assertFalse(asyncio.run(browser._answers(there)))

    def test_tries(self) -> None:
        """It may need some time to begin, but not for ever."""
        self.patch(browser, "AGAIN", (0.0, 0.0))
        answers = [False, False, True, False, False, False, True]

        async def answers_now(_: Server) -> bool:
            return answers.pop(0)

        self.patch(browser, "_answers", answers_now)
        server, other = (Server(IPv4Address("10.9.0.2"), port) for port in (80, 81))

        async def run() -> None:
            browsing = browser.Browsing(INTERFACES, lambda _: None, lambda: None)
            browsing._names.update("ab")
            for _ in range(3):
                await browsing._try("a", server)
                await asyncio.sleep(0)
            self.assertEqual(browsing._announced.servers, [server])
            self.assertEqual(list(browsing._waiting), ["a"])
            for _ in range(3):
                await browsing._try("b", other)
            await browsing._try("b", other)  # forgotten meanwhile
            self.assertEqual(browsing._announced.servers, [server])
            self.assertEqual(browsing._names, {"a"})

        asyncio.run(run())
        self.assertEqual(answers, [])

    def test_crowd(self) -> None:
        """With too many names, they are forgotten soon, and somebody is told."""

        async def answers_not(_: Server) -> bool:
            return False

        self.patch(browser, "_answers", answers_not)
        full: list[int] = []

        async def run() -> None:
            browsing = browser.Browsing(INTERFACES, lambda _: None, lambda: full.append(1))
            for number in range(browser.MOST_NAMES):
                browsing._stirred(name=str(number), state_change=None)
            self.assertEqual((full, browsing.crowded), ([], False))
            browsing._stirred(name="more", state_change=None)
            browsing._stirred(name="5", state_change=None)
            self.assertEqual((full, browsing.crowded), ([1], True))
            self.assertEqual(len(browsing._waiting), browser.MOST_NAMES)
            await browsing._try("5", Server(IPv4Address("10.9.0.2"), 80))
            self.assertNotIn("5", browsing._names)

        asyncio.run(run())


class DiscoveryCase(TestCase):
    """U25: the process that browses."""

    timeout = 30

    def setUp(self) -> None:
        self.told: DeferredQueue[list[str]] = DeferredQueue()
        self.discovery = Discovery(
            reactor, os.environ, lambda servers: self.told.put([each.url for each in servers])
        )
        self.addCleanup(self.discovery.stop)


class ProcessTests(DiscoveryCase):
    async def test_without_zeroconf(self) -> None:
        """O25: it says what is missing, and that is all."""
        boot = discovery._BOOT.replace("import sys;", "import sys; sys.modules['zeroconf'] = None;")
        self.patch(discovery, "_BOOT", boot)
        self.patch(discovery, "RETRY", 0)
        warnings: list[str] = []
        self.patch(
            discovery._log, "warn", lambda text, **more: warnings.append(text.format(**more))
        )
        self.discovery.start()
        await self.discovery._ended
        self.assertEqual(self.discovery.pid, 0)
        self.assertIsNone(self.discovery._timer)
        self.assertIn("'zeroconf' is not installed", warnings[0])

    def test_never_starts(self) -> None:
        """It is tried again, but not often."""
        clock, waits = Clock(), []

        def start_helper(*_: object) -> None:
            raise OSError("no more processes")

        self.patch(discovery, "start_helper", start_helper)
        self.patch(discovery._log, "error", lambda *_, seconds, why: waits.append(seconds))
        tried = Discovery(clock, {}, lambda _: None)
        tried.start()
        for _ in range(7):
            clock.advance(waits[-1])
        self.assertEqual(waits, [60, 120, 240, 480, 960, 1920, 3600, 3600])
        tried.stop()
        self.assertEqual(clock.getDelayedCalls(), [])

    async def test_nonsense(self) -> None:
        """What it tells that makes no sense is its end, and not the daemon's."""
        boot = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); "
        boot += 's.send(b\'["servers", [["10.9.0.2", "x"]]]\\n\'); s.recv(1)'
        self.patch(discovery, "_BOOT", boot)
        self.discovery.start()
        await self.discovery._ended
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)
        self.assertIsNotNone(self.discovery._timer)


@requires_lan
class NetworkTests(DiscoveryCase):
    """Two machines, of which one browses and the other announces."""

    def setUp(self) -> None:
        super().setUp()
        self.here, self.there = Machine(self), Machine(self)
        start = discovery.start_helper

        def start_there(*arguments: Any) -> subprocess.Popen[bytes]:
            with self.here.entered():
                return start(*arguments)

        self.patch(discovery, "start_helper", start_there)

    async def told_of(self, *urls: str) -> None:
        """Wait until exactly the servers URLS are there."""
        while await self.told.get() != list(urls):
            pass

    async def test_come_and_go(self) -> None:
        """A server comes before, and another one after; both go; it dies and is replaced."""
        connect(self.here, self.there)
        own = announce(self, self.here, "10.9.0.1", "own=10.9.0.1:80")
        stop = announce(self, self.there, "10.9.0.2", "a=172.17.0.1,10.9.0.2:8080")
        self.discovery.start()
        self.assertEqual(await self.told.get(), [])
        self.assertEqual(await self.told.get(), ["http://10.9.0.2:8080"])
        status = Path(f"/proc/{self.discovery.pid}/status").read_text().split()
        for name in ("CapInh:", "CapPrm:", "CapEff:", "CapBnd:"):
            self.assertEqual(int(status[status.index(name) + 1], 16), 0)
        self.assertGreater(int(status[status.index("Uid:") + 1]), 65000)
        stop()
        self.assertEqual(await self.told.get(), [])
        self.patch(discovery, "RETRY", 0)
        self.patch(discovery._log, "error", lambda *_, **__: None)
        os.kill(self.discovery.pid, 9)
        self.assertEqual(await self.told.get(), [])
        announce(self, self.there, "10.9.0.2", "b=10.9.0.2:8081")
        self.assertEqual(await self.told.get(), ["http://10.9.0.2:8081"])
        own()

    async def test_network_comes_late(self) -> None:
        """The daemon may be started before the network is up."""
        self.discovery.start()
        self.assertEqual(await self.told.get(), [])
        connect(self.here, self.there)
        announce(self, self.there, "10.9.0.2", "a=10.9.0.2:8080")
        self.assertEqual(await self.told.get(), ["http://10.9.0.2:8080"])
        self.here.ip("address", "flush", "dev", "lan")
        self.assertEqual(await self.told.get(), [])

    async def test_hostile(self) -> None:
        """Nonsense has no effect; who announces a lot gets four servers."""
        connect(self.here, self.there)
        for address in ("10.9.0.3/24", "10.9.0.4/24"):
            self.there.ip("address", "add", address, "dev", "lan")
        self.discovery.start()
        self.assertEqual(await self.told.get(), [])
        announce(
            self,
            self.there,
            *("--raw", "10.9.0.2", "a\nhttp://6.6.6.6:80\n=10.9.0.2:80", "b=10.9.0.2:0"),
            *(f"c{n}={address}:80" for n, address in enumerate(self._forbidden)),
            *(f"d{n}=10.9.0.3:{n}" for n in range(1, 300)),
        )
        announce(self, self.there, "10.9.0.2", "e=10.9.0.4:9999")
        urls: set[str] = set()
        while "http://10.9.0.4:9999" not in urls:
            urls = set(await self.told.get())
        urls -= {"http://10.9.0.4:9999", "http://10.9.0.2:80"}
        self.assertLessEqual(urls, {f"http://10.9.0.3:{n}" for n in range(1, 300)})
        self.assertEqual(len(urls), MOST_AT_ADDRESS)

    _forbidden = (
        *("127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "8.8.8.8"),
        *("10.9.0.1", "10.9.0.0", "10.9.0.255"),
    )
