"""Slots for builds: how many run at once, and whose turn it is (spec: build §3).

Every request has a `Share` with a limit of its own.  A free slot goes to the client
with the fewest running builds; among clients, and then among the requests of one, that
have equally many, to who has waited longest since the last one; and within a request
to the build that comes first.  So a client with one build does not wait behind another's
thousand, however many requests the other makes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from twisted.internet.defer import Deferred

Priority: TypeAlias = tuple[Any, ...]
"""What is smaller goes first; see `chains.rank`."""


@dataclass(order=True, slots=True)
class _Ticket:
    """A build that waits."""

    priority: Priority
    number: int
    granted: Deferred[Slot] = field(compare=False)
    dead: bool = field(default=False, compare=False)


@dataclass(slots=True, eq=False)
class Slot:
    """The right to run one build, until `Scheduler.release`.

    :ivar share: to whose account it goes.
    """

    share: Share


@dataclass(slots=True, eq=False)
class _Client:
    key: Hashable
    running: int = 0
    served: int = 0
    """When it got its last slot, as a number of that."""
    shares: int = 0


class Share:
    """One request's part of the slots; made by `Scheduler.share`, ended by `close`."""

    def __init__(self, scheduler: Scheduler, max_jobs: int, client: _Client) -> None:
        self.max_jobs = max_jobs
        self.running = 0
        self.served = 0
        self.client = client
        self._scheduler = scheduler
        self._queue: list[_Ticket] = []
        self._waiting = 0

    @property
    def closed(self) -> bool:
        """Whether nothing begins any more, in any share."""
        return self._scheduler.closed

    def may_start(self, local: bool) -> bool:
        """Whether a build could ever start here; `local` ones do so even with no jobs."""
        return not self.closed and (self.max_jobs > 0 or local)

    def acquire(self, priority: Priority, local: bool = False) -> Deferred[Slot]:
        """Wait for a slot; cancel the Deferred to give up.

        :param local: whether one may start although the limit is 0, when nothing runs.
        """
        if not (self.max_jobs or local):
            return Deferred()  # Nothing will ever come of it.
        number = next(self._scheduler.numbers)
        ticket = _Ticket(priority, number, Deferred(lambda _: self._drop(ticket)))
        heapq.heappush(self._queue, ticket)
        self._waiting += 1
        self._scheduler._enqueue(self)
        return ticket.granted

    def close(self) -> None:
        """Start nothing more here; running builds keep their slots."""
        self._queue.clear()
        self._waiting = 0
        self._scheduler._leave(self)

    def _drop(self, ticket: _Ticket) -> None:
        ticket.dead = True
        if self._waiting:
            self._left()

    def _left(self) -> None:
        self._waiting -= 1
        if not self._waiting:
            self._scheduler._dequeue(self)

    @property
    def _has_room(self) -> bool:
        # All that waits with a limit of 0 is local: one of them may run.
        return self.running < (self.max_jobs or 1)

    @property
    def _order(self) -> tuple[int, ...]:
        return (self.client.running, self.client.served, self.running, self.served)

    def _take(self) -> _Ticket:
        """Take out the first that waits; there is one."""
        ticket = heapq.heappop(self._queue)
        while ticket.dead:
            ticket = heapq.heappop(self._queue)
        self._left()
        return ticket


class Scheduler:
    """Shares a number of slots out between requests.

    :param limit: returns how many builds may run at once, `None` for any number.
    :ivar closed: whether nothing may begin any more.
    """

    def __init__(self, limit: Callable[[], int | None] = lambda: None) -> None:
        self.closed = False
        self.running = 0
        self.numbers = itertools.count(1)
        self._limit = limit
        self._clients: dict[Hashable, _Client] = {}
        self._waiting: dict[Share, None] = {}
        self._sharing = False

    def share(self, max_jobs: int, client: Hashable = None) -> Share:
        """Return a new share whose builds, together, take at most MAX_JOBS slots.

        :param client: whose it is; all shares of one client are served as one.
        """
        entry = self._clients.setdefault(client, _Client(client))
        entry.shares += 1
        return Share(self, max_jobs, entry)

    def release(self, slot: Slot) -> None:
        """Take SLOT back and start what waits for it."""
        self.running -= 1
        self._charge(slot.share, -1)
        self._run()

    def move(self, slot: Slot, share: Share) -> None:
        """Let SLOT go to the account of SHARE, as the build goes on for another client."""
        self._charge(slot.share, -1)
        slot.share = share
        self._charge(share, 1)
        self._run()

    def close(self) -> None:
        """Let nothing more begin."""
        self.closed = True

    @staticmethod
    def _charge(share: Share, number: int) -> None:
        share.running += number
        share.client.running += number

    def _enqueue(self, share: Share) -> None:
        self._waiting[share] = None
        self._run()

    def _dequeue(self, share: Share) -> None:
        self._waiting.pop(share, None)

    def _leave(self, share: Share) -> None:
        self._dequeue(share)
        share.client.shares -= 1
        if not share.client.shares:
            del self._clients[share.client.key]

    def _run(self) -> None:
        # Who gets a slot may give it back at once; this loop then goes on.
        if self._sharing:
            return
        self._sharing = True
        try:
            while self._has_room():
                able = [share for share in self._waiting if share._has_room]
                if not able:
                    return
                self._grant(min(able, key=lambda share: share._order))
        finally:
            self._sharing = False

    def _has_room(self) -> bool:
        if self.closed or not self._waiting:
            return False
        limit = self._limit()
        return limit is None or self.running < max(limit, 1)

    def _grant(self, share: Share) -> None:
        ticket = share._take()
        share.served = share.client.served = next(self.numbers)
        self.running += 1
        self._charge(share, 1)
        ticket.granted.callback(Slot(share))
