"""Slots and claims."""

from __future__ import annotations

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

    @settings(deadline=None, max_examples=60)
    @given(
        st.integers(1, 4),
        st.lists(st.integers(0, 3), min_size=1, max_size=4),
        st.lists(st.integers(0, 3), max_size=40),
    )
    def test_everything_runs_once_within_limits(
        self, limit: int, jobs: list[int], requests: list[int]
    ) -> None:
        """B9: whatever comes, limits hold, and all that may run does."""
        scheduler = Scheduler(lambda: limit)
        shares = [scheduler.share(n) for n in jobs]
        running: list[Slot] = []
        expected = granted = 0
        for index in requests:
            share = shares[index % len(shares)]
            expected += share.max_jobs > 0
            share.acquire(_key("x")).addCallback(running.append)
        while running:
            self.assertLessEqual(len(running), limit)
            for share in shares:
                self.assertLessEqual(share.running, share.max_jobs)
            granted += 1
            scheduler.release(running.pop(0))
        self.assertEqual(granted, expected)


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
