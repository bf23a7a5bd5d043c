"""Slots and claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.claims import Claims
from guixd.build.scheduler import Scheduler, Share, Slot
from guixd.formats.path import StoreDirectory

STORE = StoreDirectory("/s")


def _key(name: str) -> tuple[str, str]:
    return (name, name)


class SchedulerTests(SynchronousTestCase):
    """B9: limits are kept, and free capacity is shared fairly."""

    def setUp(self) -> None:
        self.order: list[str] = []
        self.slots: dict[str, Slot] = {}

    def ask(self, share: Share, name: str, *, local: bool = False) -> Deferred[None]:
        def granted(slot: Slot) -> None:
            self.order.append(name)
            self.slots[name] = slot

        return share.acquire(_key(name), local).addCallback(granted)

    def test_limit_of_a_share(self) -> None:
        """B9: no more than max-jobs run; the rest follow in the order of their names."""
        scheduler = Scheduler()
        share = scheduler.share(2)
        for name in "a", "d", "c", "b":
            self.ask(share, name)
        self.assertEqual(self.order, ["a", "d"])
        scheduler.release(self.slots["a"])
        self.assertEqual(self.order, ["a", "d", "b"])
        scheduler.release(self.slots["d"])
        scheduler.release(self.slots["b"])
        self.assertEqual(self.order, ["a", "d", "b", "c"])
        self.assertEqual(share.running, 1)

    def test_round_robin(self) -> None:
        """A request with many builds does not keep another one from its turn."""
        scheduler = Scheduler(lambda: 1)
        many, one = scheduler.share(10), scheduler.share(10)
        for name in "m1", "m2", "m3":
            self.ask(many, name)
        self.ask(one, "o1")
        for name in "m1", "o1", "m2":
            scheduler.release(self.slots[name])
        self.assertEqual(self.order, ["m1", "o1", "m2", "m3"])

    def test_local_without_jobs(self) -> None:
        """B9: with max-jobs 0, one local build runs when nothing else does."""
        scheduler = Scheduler()
        share = scheduler.share(0)
        self.ask(share, "a")
        self.ask(share, "b", local=True)
        self.ask(share, "c", local=True)
        self.assertEqual(self.order, ["b"])
        scheduler.release(self.slots["b"])
        self.assertEqual(self.order, ["b", "c"])
        self.assertFalse(share.may_start(False))
        self.assertTrue(share.may_start(True))

    def test_cancel(self) -> None:
        """Who gives up is passed over."""
        scheduler = Scheduler(lambda: 1)
        share = scheduler.share(1)
        self.ask(share, "a")
        waiting = self.ask(share, "b")
        self.ask(share, "c")
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        scheduler.release(self.slots["a"])
        self.assertEqual(self.order, ["a", "c"])

    def test_clients_are_served_alike(self) -> None:
        """B9: many requests of one client count as one client; the freest goes first."""
        scheduler = Scheduler(lambda: 4)
        many = [scheduler.share(4, client=1) for _ in range(4)]
        for number, share in enumerate(many):
            for build in range(3):
                self.ask(share, f"m{number}{build}")
        self.assertEqual(self.order, ["m00", "m01", "m02", "m10"])
        other = scheduler.share(4, client=2)
        for name in "o1", "o2", "o3":
            self.ask(other, name)
        for name in "m00", "m01", "m02":
            scheduler.release(self.slots[name])
        # Two each; then the turn goes on among the requests of the first client.
        self.assertEqual(self.order[4:], ["o1", "o2", "m20"])

    def test_slot_that_moves(self) -> None:
        """B8: a build that goes on for another client is charged to that one."""
        scheduler = Scheduler(lambda: 2)
        first, second = scheduler.share(1, client=1), scheduler.share(1, client=2)
        self.ask(first, "a")
        scheduler.move(self.slots["a"], second)
        self.ask(second, "b")
        self.assertEqual((first.running, second.running, self.order), (0, 1, ["a"]))
        scheduler.release(self.slots["a"])
        self.assertEqual(self.order, ["a", "b"])

    def test_room_of_a_slot_that_moves(self) -> None:
        """The share that it leaves goes on, also with one job; a closed share gets nothing."""
        scheduler = Scheduler()
        first, second = scheduler.share(1), scheduler.share(1)
        for name in "a", "b":
            self.ask(first, name)
        self.assertTrue(first.may_start(local=False))
        scheduler.move(self.slots["a"], second)
        self.assertEqual(self.order, ["a", "b"])
        for name in "c", "d":
            self.ask(first, name)
        first.close()
        scheduler.release(self.slots["b"])
        self.assertEqual(self.order, ["a", "b"])

    def test_closed(self) -> None:
        """O20: once closed, nothing begins, whatever ends."""
        scheduler = Scheduler(lambda: 1)
        share = scheduler.share(1)
        self.ask(share, "a")
        self.ask(share, "b")
        scheduler.close()
        scheduler.release(self.slots["a"])
        self.assertEqual((self.order, scheduler.running), (["a"], 0))
        self.assertFalse(share.may_start(True))


@dataclass
class Model:
    """What `Scheduler` must do, without regard to cost."""

    limit: int
    jobs: list[int]
    clients: list[int]
    waiting: list[tuple[int, int, int]] = field(default_factory=list)
    """Share, priority, number."""
    running: list[tuple[int, int]] = field(default_factory=list)
    """Share, number."""
    grants: list[tuple[int, int]] = field(default_factory=list)

    def settle(self) -> None:
        while len(self.running) < self.limit:
            able = {share for share, _, _ in self.waiting if self.has_room(share)}
            if not able:
                return
            chosen = min(able, key=self.claim)
            ticket = min((p, n) for share, p, n in self.waiting if share == chosen)
            self.waiting.remove((chosen, *ticket))
            self.running.append((chosen, ticket[1]))
            self.grants.append((chosen, ticket[1]))

    def has_room(self, share: int) -> bool:
        return sum(other == share for other, _ in self.running) < max(self.jobs[share], 1)

    def claim(self, share: int) -> tuple[int, ...]:
        """Return what is the smaller the better the claim of SHARE is."""
        client = self.clients[share]

        def last(mine: Callable[[int], bool]) -> int:
            return max((n for n, (s, _) in enumerate(self.grants) if mine(s)), default=-1)

        def running(mine: Callable[[int], bool]) -> int:
            return sum(mine(other) for other, _ in self.running)

        of_client: Callable[[int], bool] = lambda other: self.clients[other] == client  # noqa: E731
        return (
            running(of_client), last(of_client), running(share.__eq__), last(share.__eq__),
            min(n for other, _, n in self.waiting if other == share),
        )  # fmt: skip


class ModelTests(SynchronousTestCase):
    """B9: the order of all grants is that of a model."""

    @settings(deadline=None, max_examples=150)
    @given(
        st.integers(1, 5),
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=5),
        st.lists(
            st.one_of(
                st.tuples(st.just("ask"), st.integers(0, 4), st.integers(0, 3)),
                st.tuples(st.sampled_from(["end", "leave"]), st.integers(0, 20), st.just(0)),
            ),
            max_size=50,
        ),
    )
    def test_against_the_model(
        self,
        limit: int,
        shares: list[tuple[int, int]],
        steps: list[tuple[str, int, int]],
    ) -> None:
        """B9: limits hold and turns are fair, whatever is asked for, ends or is given up."""
        scheduler = Scheduler(lambda: limit)
        real = [scheduler.share(jobs, client) for jobs, client in shares]
        model = Model(limit, [jobs for jobs, _ in shares], [client for _, client in shares])
        granted: list[tuple[int, int]] = []
        slots: dict[int, Slot] = {}
        tickets: dict[int, Deferred[None]] = {}

        def asked(share: int, number: int) -> Callable[[Slot], None]:
            def grant(slot: Slot) -> None:
                granted.append((share, number))
                slots[number] = slot
                tickets.pop(number, None)

            return grant

        for number, (what, which, priority) in enumerate(steps):
            if what == "ask":
                share = which % len(shares)
                local = model.jobs[share] == 0 and priority < 2
                if model.jobs[share] or local:
                    model.waiting.append((share, priority, number))
                ticket = real[share].acquire((priority,), local)
                ticket = ticket.addCallback(asked(share, number))
                if not ticket.called:
                    tickets[number] = ticket
            elif what == "end" and slots:
                ended = sorted(slots)[which % len(slots)]
                model.running = [entry for entry in model.running if entry[1] != ended]
                scheduler.release(slots.pop(ended))
            elif what == "leave" and tickets:
                left = sorted(tickets)[which % len(tickets)]
                model.waiting = [entry for entry in model.waiting if entry[2] != left]
                ticket = tickets.pop(left)
                ticket.cancel()
                self.failureResultOf(ticket, CancelledError)
            model.settle()
            self.assertEqual(granted, model.grants)
            self.assertEqual(scheduler.running, len(model.running))
        for share in real:
            share.close()
        self.assertEqual((scheduler._clients, scheduler._waiting), ({}, {}))


class ClaimTests(SynchronousTestCase):
    """Outputs that several derivations make."""

    def test_turns(self) -> None:
        """A claim goes to one after the other, and not to who gave up."""
        claims, path = Claims(), STORE.child("x" * 32 + "-a")
        self.assertIsNone(claims.claim(path))
        second, third = claims.claim(path), claims.claim(path)
        assert second is not None and third is not None
        second.cancel()
        self.failureResultOf(second, CancelledError)
        claims.free([path])
        self.assertIsNone(self.successResultOf(third))
        claims.free([path])
        self.assertIsNone(claims.claim(path))
