"""Which servers a client's substitutes are looked up at (spec: substitutes §1, §11)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from guixd.build.request import ClientOptions
from guixd.build.threads import Threads
from guixd.net.reach import Reach
from guixd.settings import Settings

MOST_DISCOVERED = 50
_MOST_KNOWN = 20 * MOST_DISCOVERED
_LONGEST_LIST = 1 << 20


@dataclass(frozen=True, slots=True)
class Servers:
    """Knows what has been discovered, and which servers only clients name.

    :ivar settings: say where the list of the former is.
    """

    threads: Threads
    settings: Settings
    _found: set[str] = field(default_factory=set)

    async def of(self, options: ClientOptions) -> tuple[str, ...]:
        """Return the URLs of the servers for a client with OPTIONS, those to ask first first."""
        if not options.discover:
            return options.substitute_urls
        found = await self.threads(discovered, self.settings.directories.state)
        if len(self._found) > _MOST_KNOWN:
            self._found.clear()
        self._found.update(found)
        return tuple(dict.fromkeys((*found, *options.substitute_urls)))

    def nearest(self, url: str) -> Reach:
        """Return what URL, a server or something that it has, must not be nearer than."""
        if not self.settings.refuse_private_hosts:
            return Reach.LOOPBACK
        own = (*self.settings.substitute_urls, *self._found)
        known = any(f"{url}/".startswith(server.rstrip("/") + "/") for server in own)
        return Reach.LOOPBACK if known else Reach.WORLD


def discovered(state: str) -> tuple[str, ...]:
    """Return the URLs of servers in the local network, at most `MOST_DISCOVERED`; blocks."""
    try:
        with Path(state, "discover/publish").open("rb") as file:
            lines = file.read(_LONGEST_LIST).decode("ascii", "replace").split()
    except OSError:
        return ()
    servers = list(dict.fromkeys(line for line in lines if line.startswith("http://")))
    if len(servers) > MOST_DISCOVERED:
        servers = random.sample(servers, MOST_DISCOVERED)
    return tuple(servers)
