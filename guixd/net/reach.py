"""How near an address is, and connecting to no nearer ones than allowed (spec: substitutes §10.4).

A server elsewhere may not lead to what only this machine, or this network, can reach.  What
counts is the address that a connection is made to: names can change what they mean at any
time, and numbers can be written in many ways.
"""

from __future__ import annotations

import re
import socket
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any

from twisted.internet.interfaces import IReactorPluggableNameResolver
from zope.interface import implementer

from guixd.errors import FetchError

_TRANSLATED = IPv6Network("64:ff9b::/96")
_THIS_NETWORK = 1 << 24
"""Before the first address that is not 0.x.x.x, where Linux means itself."""
_NUMERIC = re.compile(r"[0-9a-fx.]+\Z", re.IGNORECASE)


class Reach(IntEnum):
    """From where an address can be reached, the nearest first."""

    LOOPBACK = 0
    """From this machine; to allow no nearer ones allows all."""
    LINK = 1
    """From what hangs on the same wire."""
    PRIVATE = 2
    """From the same site."""
    WORLD = 3


FARTHEST = Reach.PRIVATE
"""From where all is as good as from farther away, if a server leads there."""
_CALLED = {
    Reach.LOOPBACK: "an address of this machine",
    Reach.LINK: "an address of the local link",
    Reach.PRIVATE: "a private address",
}


def reach_of(address: str) -> Reach:
    """Return from where ADDRESS, a number as the system writes it, can be reached."""
    try:
        return _reach(ip_address(address))
    except ValueError:
        return Reach.LOOPBACK


def _reach(ip: IPv4Address | IPv6Address) -> Reach:
    if ip.is_loopback or ip.is_unspecified:
        return Reach.LOOPBACK
    if isinstance(ip, IPv4Address):
        if int(ip) < _THIS_NETWORK:
            return Reach.LOOPBACK
    elif (inner := _inside(ip)) is not None:
        return _reach(inner)
    if ip.is_link_local or ip.is_multicast:
        return Reach.LINK
    site = isinstance(ip, IPv6Address) and ip.is_site_local
    return Reach.WORLD if ip.is_global and not site else Reach.PRIVATE


def _inside(ip: IPv6Address) -> IPv4Address | None:
    """Return the address that IP is another form of, or leads to."""
    number = int(ip)
    if number < 1 << 32 or ip in _TRANSLATED:
        return IPv4Address(number & 0xFFFF_FFFF)
    return ip.ipv4_mapped or ip.sixtofour


def reach_of_host(host: str) -> Reach:
    """Return from where HOST of a URL can be reached, as far as its spelling tells."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return Reach.LOOPBACK
    try:
        return _reach(ip_address(name))
    except ValueError:
        pass
    if _NUMERIC.match(name):
        try:
            return _reach(IPv4Address(socket.inet_aton(name)))
        except OSError:
            pass
    return Reach.WORLD


def check(reach: Reach, nearest: Reach, name: str) -> None:
    """Allow a connection to NAME.

    :raises FetchError: it is nearer than NEAREST (kind `address`).
    """
    if reach < nearest:
        raise FetchError("address", f"{name} is {_CALLED[reach]}, which is not connected to")


def beyond(reactor: Any, nearest: Reach) -> Any:
    """Return what is like REACTOR, but connects to nothing nearer than NEAREST."""
    return reactor if nearest is Reach.LOOPBACK else _Beyond(reactor, nearest)


@implementer(IReactorPluggableNameResolver)
class _Beyond:
    def __init__(self, reactor: Any, nearest: Reach) -> None:
        self._reactor = reactor
        self._nearest = nearest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    @property
    def nameResolver(self) -> Any:
        return self._reactor.nameResolver

    def installNameResolver(self, resolver: Any) -> Any:
        return self._reactor.installNameResolver(resolver)

    def connectTCP(self, host: str, port: int, *arguments: Any, **named: Any) -> Any:
        check(reach_of(host), self._nearest, host)
        return self._reactor.connectTCP(host, port, *arguments, **named)
