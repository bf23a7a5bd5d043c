"""How many downloads run at once: in all, and from each server (spec: substitutes §2).

They do not count as builds.  A free lane goes to the client with the fewest downloads,
and of one client's by priority; who waits for a busy server does not keep others from
going on.  However slow the servers of some are, every client has a few lanes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from twisted.internet.defer import Deferred

from guixd.build.scheduler import Priority

MOST = 16
MOST_PER_SERVER = 8
GUARANTEED = 2
"""How many lanes a client gets even if there are too many in all."""


@dataclass(frozen=True, slots=True)
class Lane:
    """The right to download something from SERVER on account of CLIENT."""

    server: str
    client: Hashable


@dataclass(order=True, slots=True)
class _Ticket:
    priority: Priority
    number: int
    granted: Deferred[Lane] = field(compare=False)
    dead: bool = field(default=False, compare=False)


class Lanes:
    """Lanes to servers.

    :ivar running: how many are in use.
    """

    def __init__(
        self,
        most: int = MOST,
        most_per_server: int = MOST_PER_SERVER,
        guaranteed: int = GUARANTEED,
    ) -> None:
        self.running = 0
        self._most = most
        self._most_per_server = most_per_server
        self._guaranteed = guaranteed
        self._servers: Counter[str] = Counter()
        self._clients: Counter[Hashable] = Counter()
        self._queues: dict[Lane, list[_Ticket]] = {}
        self._numbers = itertools.count()
        self._sharing = False

    def acquire(self, server: str, priority: Priority, client: Hashable = None) -> Deferred[Lane]:
        """Wait for a lane to SERVER; cancel the Deferred to give up.

        :param priority: what is smaller goes first.
        """
        ticket = _Ticket(priority, next(self._numbers), Deferred(lambda _: self._drop(ticket)))
        heapq.heappush(self._queues.setdefault(Lane(server, client), []), ticket)
        self._run()
        return ticket.granted

    def release(self, lane: Lane) -> None:
        """Give LANE back."""
        self.running -= 1
        self._servers.subtract([lane.server])
        self._clients.subtract([lane.client])
        if not self.running:  # neither shall grow for ever
            self._servers.clear()
            self._clients.clear()
        self._run()

    def _drop(self, ticket: _Ticket) -> None:
        ticket.dead = True

    def _run(self) -> None:
        # Who gets a lane may give it back at once; this loop then goes on.
        if self._sharing:
            return
        self._sharing = True
        try:
            while self._grant_one():
                pass
        finally:
            self._sharing = False

    def _may_run(self, lane: Lane) -> bool:
        if self._servers[lane.server] >= self._most_per_server:
            return False
        return self.running < self._most or self._clients[lane.client] < self._guaranteed

    def _grant_one(self) -> bool:
        for lane, queue in list(self._queues.items()):
            while queue and queue[0].dead:
                heapq.heappop(queue)
            if not queue:
                del self._queues[lane]
        ready = [lane for lane in self._queues if self._may_run(lane)]
        if not ready:
            return False
        lane = min(ready, key=lambda lane: (self._clients[lane.client], self._queues[lane][0]))
        ticket = heapq.heappop(self._queues[lane])
        self.running += 1
        self._servers[lane.server] += 1
        self._clients[lane.client] += 1
        ticket.granted.callback(lane)
        return True
