"""The process that finds substitute servers in the local network (spec: substitutes §11).

It browses `_guix_publish._tcp` by multicast DNS, without the daemon's privileges: what it
reads comes from anybody.  It serves the daemon over a `channel`:
    ["broken", text]            it cannot serve, and ends
    ["servers", [[address, port]...]]
The latter comes at the start and after changes.  It ends when the daemon hangs up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface
from typing import NoReturn

from guixd.net.announced import Announced, Server
from guixd.net.confinement import BROWSER_UIDS, confine

TYPE = "_guix_publish._tcp.local."
DELAY = 0.5
"""Seconds in which changes are collected before they are told."""
SETTLE = 2.0
"""Likewise, after this machine has got or lost an address, until all is found anew."""
RETRY = 60.0
"""Seconds until it is tried again to browse, if that failed, or there were too many services."""
AGAIN = (2.0, 30.0)
"""Seconds after which a server that does not answer is tried again."""
MOST_NAMES = 1024
"""Services that are looked at; others are passed over until all are looked for anew."""
_MOST_NETWORKS = 32
_AT_ONCE = 32
"""Services whose addresses are asked for at a time."""
_PATIENCE = 5000
"""Milliseconds in which a service must tell its address."""
_CONNECT = 3.0
"""Seconds in which a server must take a connection."""
_MOST_MEMORY = 1 << 30
_RTMGRP_IPV4_IFADDR = 0x10


def main(control: int) -> NoReturn:
    """Serve the daemon at the descriptor CONTROL until it hangs up."""
    end = socket.socket(fileno=control)
    end.set_inheritable(False)
    # Who stops the service signals all its processes: the daemon ends this one.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        import ifaddr  # noqa: F401
        import zeroconf.asyncio  # noqa: F401
    except ImportError:
        _break(end, "the Python package 'zeroconf' is not installed")
    logging.disable()  # Who sends nonsense shall not fill the daemon's log.
    with suppress(OSError):
        os.nice(10)
    try:
        confine(uids=BROWSER_UIDS)
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    except OSError as error:
        _break(end, f"cannot give up privileges: {error}")
    asyncio.run(_serve(end))
    os._exit(1)


def _break(end: socket.socket, text: str) -> NoReturn:
    end.send(json.dumps(["broken", text]).encode() + b"\n")
    os._exit(1)


async def _serve(end: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    loop.add_reader(end, os._exit, 0)
    moved = asyncio.Event()
    watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    watch.setblocking(False)
    watch.bind((0, _RTMGRP_IPV4_IFADDR))

    def drain() -> None:
        moved.set()
        with suppress(OSError):  # Also if some were lost: something has changed.
            while watch.recv(65536):
                pass

    loop.add_reader(watch, drain)
    told: list[tuple[str, int]] | None = None

    def tell(announced: Announced) -> None:
        nonlocal told
        servers = [(str(each.address), each.port) for each in announced.servers]
        if servers != told:
            told = servers
            end.send(json.dumps(["servers", servers]).encode() + b"\n")

    tell(Announced(()))
    settle = 0.0
    while True:
        interfaces = own_interfaces()
        browsing = Browsing(interfaces, tell, moved.set)
        works = browsing.start(settle)
        while own_interfaces() == interfaces:
            moved.clear()
            try:
                await asyncio.wait_for(moved.wait(), None if works else RETRY)
            except TimeoutError:
                break
            await asyncio.sleep(RETRY if browsing.crowded else DELAY)
            if browsing.crowded:
                break
        await browsing.stop()
        settle = SETTLE


def own_interfaces() -> list[IPv4Interface]:
    """Return this machine's addresses, in order."""
    import ifaddr

    found = set()
    for adapter in ifaddr.get_adapters():
        for each in adapter.ips:
            if each.is_IPv4:
                found.add(IPv4Interface(f"{each.ip}/{each.network_prefix}"))
    return sorted(found)


class Browsing:
    """Services that come and go, as long as this machine's addresses are INTERFACES.

    :param changed: called with what is announced, some time after that has changed.
    :param full: called when some are passed over, as there are too many.
    :ivar crowded: whether that was so.
    """

    def __init__(
        self,
        interfaces: Sequence[IPv4Interface],
        changed: Callable[[Announced], None],
        full: Callable[[], None],
    ) -> None:
        self.crowded = False
        self._full = full
        self._announced = Announced(interfaces)
        self._networks = [str(each.ip) for each in interfaces if not each.is_loopback]
        self._changed = changed
        self._names: set[str] = set()
        self._waiting: dict[str, None] = {}
        self._tries: dict[str, int] = {}
        self._more = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._zeroconf: object = None

    def start(self, settle: float) -> bool:
        """Begin, and tell nothing for SETTLE seconds; return whether that worked."""
        from zeroconf import Error, IPVersion
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

        self._tell_in(settle if self._networks else 0.0)
        if not self._networks:
            return True
        networks = self._networks[:_MOST_NETWORKS]
        try:
            self._zeroconf = own = AsyncZeroconf(networks, ip_version=IPVersion.V4Only)
            AsyncServiceBrowser(own.zeroconf, TYPE, handlers=[self._stirred])
        except (OSError, Error):
            return False
        self._tasks = [asyncio.create_task(self._resolve()) for _ in range(_AT_ONCE)]
        return True

    async def stop(self) -> None:
        """Browse no more."""
        from zeroconf.asyncio import AsyncZeroconf

        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        if isinstance(self._zeroconf, AsyncZeroconf):
            await self._zeroconf.async_close()

    def _tell_in(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._tell)

    def _tell(self) -> None:
        self._timer = None
        self._changed(self._announced)

    def _stirred(self, *, name: str, state_change: object, **_: object) -> None:
        from zeroconf import ServiceStateChange

        if state_change is ServiceStateChange.Removed:
            self._forget(name)
        elif name in self._names or len(self._names) < MOST_NAMES:
            self._names.add(name)
            self._look_at(name)
        else:
            # It will not be told of again: all are to be looked for anew, later.
            self.crowded = True
            self._full()

    def _look_at(self, name: str) -> None:
        if name in self._names:
            self._waiting[name] = None
            self._more.set()

    def _forget(self, name: str) -> None:
        self._names.discard(name)
        self._tries.pop(name, None)
        self._waiting.pop(name, None)
        self._announced.withdraw(name)
        self._tell_in(DELAY)

    async def _resolve(self) -> None:
        """Find out where the services are that wait for this."""
        while True:
            while not self._waiting:
                self._more.clear()
                await self._more.wait()
            name = next(iter(self._waiting))
            del self._waiting[name]
            server = self._announced.place(name, *await self._ask(name))
            if server is None:
                self._forget(name)
            elif not self._announced.has(name, server):
                await self._try(name, server)

    async def _try(self, name: str, server: Server) -> None:
        """Take SERVER if it is there: others would make lookups slow."""
        if not await _answers(server):
            self._announced.withdraw(name)
            tries = self._tries[name] = self._tries.get(name, 0) + 1
            if tries > len(AGAIN) or self.crowded:
                self._forget(name)
            else:
                asyncio.get_running_loop().call_later(AGAIN[tries - 1], self._look_at, name)
        elif name in self._names:  # else it is gone meanwhile
            self._tries.pop(name, None)
            if not self._announced.take(name, server):
                self._forget(name)
        self._tell_in(DELAY)

    async def _ask(self, name: str) -> tuple[list[IPv4Address], int]:
        from zeroconf import Error, IPVersion
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

        assert isinstance(self._zeroconf, AsyncZeroconf)
        try:
            info = AsyncServiceInfo(TYPE, name)
            await info.async_request(self._zeroconf.zeroconf, _PATIENCE)
            found = [IPv4Address(each) for each in info.addresses_by_version(IPVersion.V4Only)]
        except (Error, OSError, ValueError):
            return [], 0
        return found, info.port or 0


async def _answers(server: Server) -> bool:
    """Whether SERVER takes connections."""
    try:
        opening = asyncio.open_connection(str(server.address), server.port)
        _, writer = await asyncio.wait_for(opening, _CONNECT)
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return True
