"""Slots for builds: how many run at once, and whose turn it is (build.md §3).

Each request has a `Share` with its own limit; free capacity goes round the
shares in turn, and within a share to the derivation that sorts first.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from twisted.internet.defer import Deferred


@dataclass(order=True, slots=True)
class _Ticket:
    key: tuple[str, str]
    number: int
    local: bool = field(compare=False)
    granted: Deferred[Slot] = field(compare=False)
    dead: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """The right to run one build, until `Scheduler.release`."""

    share: Share


class Share:
    """One request's part of the slots; made by `Scheduler.share`."""

    def __init__(self, scheduler: Scheduler, max_jobs: int) -> None:
        self._scheduler = scheduler
        self.max_jobs = max_jobs
        self.running = 0
        self._queue: list[_Ticket] = []
        self._numbers = itertools.count()

    def may_start(self, local: bool) -> bool:
        """Whether a build could ever start here; `local` ones do so even with no jobs."""
        return self.max_jobs > 0 or local

    def acquire(self, key: tuple[str, str], local: bool = False) -> Deferred[Slot]:
        """Wait for a slot; cancel the Deferred to give up.

        :param key: what sorts first goes first.
        :param local: whether one may start although the limit is 0, when nothing runs.
        """
        ticket = _Ticket(key, next(self._numbers), local, Deferred(lambda _: self._drop(ticket)))
        heapq.heappush(self._queue, ticket)
        self._scheduler._enqueue(self)
        return ticket.granted

    def close(self) -> None:
        """Start nothing more here; running builds keep their slots."""
        self._queue.clear()

    def _drop(self, ticket: _Ticket) -> None:
        ticket.dead = True

    def _next(self) -> _Ticket | None:
        """Take out the ticket that may start now, if any."""
        while self._queue and self._queue[0].dead:
            heapq.heappop(self._queue)
        if not self._queue:
            return None
        if self.running < self.max_jobs:
            return heapq.heappop(self._queue)
        if self.running:
            return None
        best = min((t for t in self._queue if t.local and not t.dead), default=None)
        if best is not None:
            self._queue.remove(best)
            heapq.heapify(self._queue)
        return best

    def _waiting(self) -> bool:
        return any(not ticket.dead for ticket in self._queue)


class Scheduler:
    """Shares a number of slots out between requests.

    :param limit: returns how many builds may run at once, `None` for any number.
    """

    def __init__(self, limit: Callable[[], int | None] = lambda: None) -> None:
        self._limit = limit
        self._turn: deque[Share] = deque()
        self._sharing = False
        self.running = 0

    def share(self, max_jobs: int) -> Share:
        """Return a new share whose builds, together, take at most MAX_JOBS slots."""
        return Share(self, max_jobs)

    def release(self, slot: Slot) -> None:
        """Take SLOT back and start what waits for it."""
        self.running -= 1
        slot.share.running -= 1
        self._run()

    def _enqueue(self, share: Share) -> None:
        if share not in self._turn:
            self._turn.append(share)
        self._run()

    def _run(self) -> None:
        # Who gets a slot may give it back at once; this loop then goes on.
        if self._sharing:
            return
        self._sharing = True
        try:
            self._share_out()
        finally:
            self._sharing = False

    def _share_out(self) -> None:
        idle = 0
        while self._turn and idle < len(self._turn):
            limit = self._limit()
            if limit is not None and self.running >= max(limit, 1):
                return
            share = self._turn.popleft()
            ticket = share._next()
            if ticket is None:
                if share._waiting():
                    self._turn.append(share)
                    idle += 1
                continue
            idle = 0
            self._turn.append(share)
            self.running += 1
            share.running += 1
            ticket.granted.callback(Slot(share))
