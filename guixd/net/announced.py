"""Which of the servers that announce themselves are taken (spec: substitutes §11).

Anybody in the local network can announce anything: names, addresses and numbers of servers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface

MOST_SERVERS = 200
MOST_AT_ADDRESS = 4
"""Servers of one machine."""


@dataclass(frozen=True, slots=True, order=True)
class Server:
    """One substitute server.

    :raises ValueError: there can be none at this port.
    """

    address: IPv4Address
    port: int

    def __post_init__(self) -> None:
        if type(self.port) is not int or not 0 < self.port < 1 << 16:
            raise ValueError(f"{self.port!r} is no port")

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"


def read_servers(told: Sequence[Sequence[object]]) -> tuple[Server, ...]:
    """Return the servers that the process that browses tells of, as pairs of texts and ports.

    :raises ValueError: these are no servers.
    """
    if len(told) > MOST_SERVERS:
        raise ValueError("too many servers")
    servers = []
    for address, port in told:
        if not isinstance(address, str) or not isinstance(port, int):
            raise ValueError("no pair of an address and a port")
        servers.append(Server(IPv4Address(address), port))
    return tuple(servers)


class Announced:
    """The services that are announced at the moment.

    :param interfaces: this machine's addresses, with the networks that they are in.  A server
        must be in one of these, as announcements do not go further.
    """

    def __init__(self, interfaces: Iterable[IPv4Interface]) -> None:
        self._own = {interface.ip for interface in interfaces}
        self._networks = [each.network for each in interfaces if not each.is_loopback]
        self._services: dict[str, Server] = {}
        self._at: Counter[IPv4Address] = Counter()

    @property
    def servers(self) -> list[Server]:
        """All of them, each once, in order."""
        return sorted(set(self._services.values()))

    def place(self, name: str, addresses: Iterable[IPv4Address], port: int) -> Server | None:
        """Return where the service NAME is that is announced to be at ADDRESSES.

        That is the first address that will do, but rather the one that it had before.

        :return: `None` if none will do, as when it is this machine's own.
        """
        usable = [address for address in addresses if self._may_be(address)]
        before = self._services.get(name)
        if before is not None and before.address in usable:
            usable = [before.address]
        try:
            return Server(usable[0], port) if usable else None
        except ValueError:
            return None

    def has(self, name: str, server: Server) -> bool:
        """Whether SERVER is what the service NAME is known to be."""
        return self._services.get(name) == server

    def take(self, name: str, server: Server) -> bool:
        """Take note that the service NAME is SERVER now; return whether there is room for it."""
        self.withdraw(name)
        if self._at[server.address] >= MOST_AT_ADDRESS or len(self._services) >= MOST_SERVERS:
            return False
        self._services[name] = server
        self._at[server.address] += 1
        return True

    def withdraw(self, name: str) -> None:
        """Forget the service NAME."""
        server = self._services.pop(name, None)
        if server is not None:
            self._at[server.address] -= 1
            self._at += Counter()  # without zeros

    def _may_be(self, address: IPv4Address) -> bool:
        if address in self._own or address.is_loopback or address.is_multicast:
            return False
        if address.is_unspecified or address.is_reserved:
            return False
        for network in self._networks:
            if address in network:
                ends = (network.network_address, network.broadcast_address)
                return network.prefixlen > 30 or address not in ends
        return False
