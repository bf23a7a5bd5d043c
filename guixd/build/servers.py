"""Which servers a client's substitutes are looked up at (spec: substitutes §1, §11)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from guixd.build.request import ClientOptions
from guixd.build.threads import Threads

MOST_DISCOVERED = 50
_LONGEST_LIST = 1 << 20


@dataclass(frozen=True, slots=True)
class Servers:
    """Knows what has been discovered.

    :ivar state: the directory of states, where the list of these servers is.
    """

    threads: Threads
    state: str

    async def of(self, options: ClientOptions) -> tuple[str, ...]:
        """Return the URLs of the servers for a client with OPTIONS, those to ask first first."""
        if not options.discover:
            return options.substitute_urls
        found = await self.threads(discovered, self.state)
        return tuple(dict.fromkeys((*found, *options.substitute_urls)))


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
