"""How many downloads run at once (U22)."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.lanes import Lane, Lanes


class LaneTests(SynchronousTestCase):
    def waiting(self, lanes: Lanes, server: str, *priority: int) -> Deferred[Lane]:
        lane = lanes.acquire(server, priority)
        self.assertNoResult(lane)
        return lane

    def test_limits(self) -> None:
        """U22: so many from each server, and so many in all."""
        lanes = Lanes(most=3, most_per_server=2, guaranteed=0)
        first, _, other = (self.successResultOf(lanes.acquire(server, ())) for server in "aab")
        more = [self.waiting(lanes, server) for server in "abc"]
        lanes.release(other)  # a has its two already
        other = self.successResultOf(more[1])
        self.assertNoResult(more[0])
        lanes.release(first)
        self.successResultOf(more[0])
        lanes.release(other)
        self.successResultOf(more[2])
        self.assertEqual(lanes.running, 3)

    def test_clients(self) -> None:
        """U22: who has the fewest is served first, and others' slow servers do no harm."""
        lanes = Lanes(most=4, most_per_server=3, guaranteed=1)
        slow = [lanes.acquire("slow", (0,), "one") for _ in range(4)]
        self.assertEqual([lane.called for lane in slow], [True, True, True, False])
        self.successResultOf(lanes.acquire("good", (9,), "two"))
        second = lanes.acquire("good", (9,), "two")
        self.assertNoResult(second)
        third = self.successResultOf(lanes.acquire("good", (9,), "three"))  # the fifth
        lanes.release(third)
        self.assertNoResult(second)
        lanes.release(self.successResultOf(slow[0]))
        self.successResultOf(second)
        self.assertNoResult(slow[3])
        lanes.release(self.successResultOf(slow[1]))
        self.successResultOf(slow[3])

    def test_priorities(self) -> None:
        """U22: what is smaller goes first, over all servers; of equals, who came first."""
        lanes = Lanes(most=1, most_per_server=1, guaranteed=0)
        lane = self.successResultOf(lanes.acquire("a", ()))
        last, first, second = (
            self.waiting(lanes, server, number) for server, number in (("a", 2), ("a", 1), ("b", 1))
        )
        for waiting in first, second, last:
            lanes.release(lane)
            lane = self.successResultOf(waiting)

    def test_giving_up(self) -> None:
        """U28: who gives up is passed over, wherever it waits."""
        lanes = Lanes(most=1, most_per_server=1, guaranteed=0)
        held = self.successResultOf(lanes.acquire("a", ()))
        gone = [self.waiting(lanes, "a", 1), self.waiting(lanes, "b", 2)]
        for lane in gone:
            lane.cancel()
            self.failureResultOf(lane, CancelledError)
        left = self.waiting(lanes, "a", 3)
        lanes.release(held)
        lanes.release(self.successResultOf(left))
        self.assertEqual(lanes.running, 0)

    def test_given_back_at_once(self) -> None:
        """U22: any number of downloads may end the moment they begin."""
        lanes = Lanes(most=1, most_per_server=1, guaranteed=0)
        held = self.successResultOf(lanes.acquire("a", ()))
        done: list[int] = []

        def end(lane: Lane, number: int) -> None:
            done.append(number)
            lanes.release(lane)

        for number in range(3000):
            lanes.acquire("a", (number,)).addCallback(end, number)
        lanes.release(held)
        self.assertEqual((done, lanes.running), (list(range(3000)), 0))

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=40))
    def test_any_order(self, steps: list[tuple[str, int]]) -> None:
        """U22: no limit is ever exceeded, and no lane is idle that somebody could use."""
        lanes = Lanes(most=4, most_per_server=2, guaranteed=0)
        held: list[Lane] = []
        waiting: list[tuple[str, Deferred[Lane]]] = []
        for server, what in steps:
            if what == 0 and held:
                lanes.release(held.pop(0))
            elif what == 1 and waiting:
                waiting.pop()[1].addErrback(lambda failure: failure.trap(CancelledError)).cancel()
            else:
                waiting.append((server, lanes.acquire(server, (what,))))
            held += [self.successResultOf(lane) for _, lane in waiting if lane.called]
            waiting = [each for each in waiting if not each[1].called]
            self.assertEqual(lanes.running, len(held))
            self.assertLessEqual(len(held), 4)
            used = [lane.server for lane in held]
            self.assertLessEqual(max(map(used.count, "abc")), 2)
            if len(held) < 4:
                self.assertFalse([s for s, _ in waiting if used.count(s) < 2])
