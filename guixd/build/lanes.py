"""How many downloads run at once: in all, and from each server (spec: substitutes §2).

They do not count as builds.  Who waits is served by priority, and who waits for a busy
server does not keep others from going on.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

from twisted.internet.defer import Deferred

from guixd.build.scheduler import Priority

MOST = 16
MOST_PER_SERVER = 8


@dataclass(order=True, slots=True)
class _Ticket:
    priority: Priority
    number: int
    granted: Deferred[None] = field(compare=False)
    dead: bool = field(default=False, compare=False)


class Lanes:
    """Lanes to servers.

    :ivar running: how many are in use.
    """

    def __init__(self, most: int = MOST, most_per_server: int = MOST_PER_SERVER) -> None:
        self.running = 0
        self._most = most
        self._most_per_server = most_per_server
        self._used: dict[str, int] = {}
        self._queues: dict[str, list[_Ticket]] = {}
        self._numbers = itertools.count()
        self._sharing = False

    def acquire(self, server: str, priority: Priority) -> Deferred[None]:
        """Wait for a lane to SERVER; cancel the Deferred to give up.

        :param priority: what is smaller goes first.
        """
        ticket = _Ticket(priority, next(self._numbers), Deferred(lambda _: self._drop(ticket)))
        heapq.heappush(self._queues.setdefault(server, []), ticket)
        self._run()
        return ticket.granted

    def release(self, server: str) -> None:
        """Give a lane to SERVER back."""
        self.running -= 1
        self._used[server] -= 1
        if not self._used[server]:
            del self._used[server]
        self._run()

    def _drop(self, ticket: _Ticket) -> None:
        ticket.dead = True

    def _run(self) -> None:
        # Who gets a lane may give it back at once; this loop then goes on.
        if self._sharing:
            return
        self._sharing = True
        try:
            while self.running < self._most and self._grant_one():
                pass
        finally:
            self._sharing = False

    def _grant_one(self) -> bool:
        for server, queue in list(self._queues.items()):
            while queue and queue[0].dead:
                heapq.heappop(queue)
            if not queue:
                del self._queues[server]
        ready = [
            (queue[0], server)
            for server, queue in self._queues.items()
            if self._used.get(server, 0) < self._most_per_server
        ]
        if not ready:
            return False
        ticket, server = min(ready)
        heapq.heappop(self._queues[server])
        self.running += 1
        self._used[server] = self._used.get(server, 0) + 1
        ticket.granted.callback(None)
        return True
