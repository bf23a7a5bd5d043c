"""One builder for several clients, each with options of its own."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.patience import Patience
from guixd.build.request import ClientOptions
from tests.build.graph import Recorder
from tests.build.test_goals import Fake
from tests.support import is_root


class OptionsTests(Fake):
    """What the options of each client mean for a build that it shares."""

    def test_own_limits(self) -> None:
        """B7, B11: a client whose limit is over goes with status 101; the others wait on."""
        world, hasty, patient = self.world, Recorder(), Recorder()
        drv = world.derive("a")
        one = world.build(drv, observer=hasty, timeout=10)
        two = world.build(drv, observer=patient, max_silent_time=30)
        gone = Recorder()
        leaving = world.build(drv, observer=gone, timeout=12)
        leaving.cancel()
        self.failureResultOf(leaving, CancelledError)
        self.clock.advance(5)
        late = world.build(drv, timeout=10)
        self.launcher["a"].say("x\n")
        self.clock.advance(5)
        error = self.error(one)
        self.assertEqual(error.status, 101)
        self.assertEqual(hasty.traces[-1], f"@ build-failed {drv} - timeout")
        self.assertIn("timed out after 10 seconds", hasty.logs[-1])
        self.assertEqual([e[1] for e in hasty.events if e[0] == "words"], [("x",)])
        self.assertNoResult(late)
        self.clock.advance(5)  # It came later, so that its time was over later.
        self.assertEqual(self.error(late).status, 101)
        self.assertEqual(self.launcher.running, ["a"])
        self.launcher["a"].finish()
        self.successResultOf(two)
        self.assertEqual(len(patient.traces), 2)
        self.assertNotIn("timed out", "".join(gone.logs))

    def test_last_limit(self) -> None:
        """B11: when the limits of all are over, the builder is killed and nothing is left."""
        world = self.world
        drv = world.derive("a")
        one, two = world.build(drv, timeout=10), world.build(drv, max_silent_time=20)
        self.clock.advance(10)
        self.assertEqual(self.error(one).status, 101)
        self.assertFalse(self.launcher["a"].killed)
        self.clock.advance(10)
        self.assertEqual(self.error(two).status, 101)
        self.assertTrue(self.launcher["a"].killed)
        self.assertEqual(world.leftovers(), [])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_keep_going(self) -> None:
        """B3, B4: whether a client goes on after a failure is its own matter."""
        world = self.world
        a, b = world.derive("a"), world.derive("b")
        one = world.build(a, b, max_jobs=2)
        two = world.build(a, b, max_jobs=2, keep_going=True)
        self.launcher["a"].finish(1)
        self.assertEqual(self.error(one).status, 100)
        self.assertEqual(self.launcher.running, ["b"])
        self.assertNoResult(two)
        self.launcher["b"].finish()
        self.assertEqual(self.error(two).text, f"build of `{a}' failed")
        self.assertTrue(world.is_valid(b))

    def _failed(self, *keep: bool, leaves: int | None = None) -> list[os.stat_result]:
        """Let a shared build fail; return what is left of it in the temporary directory."""
        world = self.world
        drv = world.derive("a", environment={"number": str(self.clock.seconds())})
        self.clock.advance(1)
        requests = [
            world.build(drv, keep_failed=kept, client_uid=5000 + n, client_gid=6000 + n)
            for n, kept in enumerate(keep)
        ]
        if leaves is not None:
            requests[leaves].cancel()
            self.failureResultOf(requests.pop(leaves), CancelledError)
        self.launcher["a"].finish(1)
        for request in requests:
            self.error(request)
        top = world.settings.directories.temporary
        return [os.stat(f"{top}/{name}") for name in sorted(os.listdir(top))]

    def test_keep_failed(self) -> None:
        """B7: a failed build is kept if any of its clients wants it, for that one."""
        (kept,) = self._failed(False, True)
        if is_root():
            self.assertEqual((kept.st_uid, kept.st_gid), (5001, 6001))

    def test_who_wanted_to_keep_leaves(self) -> None:
        """B8: what the client wanted that came first does not count when it has gone."""
        self.assertEqual(self._failed(True, False, leaves=0), [])

    def test_other_client_goes_on_in_its_own_slot(self) -> None:
        """B9: a build that goes on for another client counts for that one."""
        world = self.world
        a, b, c, d = (world.derive(name) for name in "abcd")
        one = world.build(a, max_jobs=1, client_uid=1)
        two = world.build(a, b, d, max_jobs=1, client_uid=2)
        self.assertEqual(self.launcher.running, ["a", "b"])
        one.cancel()
        self.failureResultOf(one, CancelledError)
        three = world.build(c, max_jobs=1, client_uid=1)
        self.assertEqual(self.launcher.running, ["a", "b", "c"])
        self.launcher["b"].finish()
        self.assertEqual(self.launcher.running, ["a", "c"])
        for name in "acd":
            self.launcher[name].finish()
        self.successResultOf(two)
        self.successResultOf(three)


class PatienceTests(SynchronousTestCase):
    """B11, B12: the limits of several clients of one builder."""

    @settings(deadline=None, max_examples=80)
    @given(
        st.lists(st.integers(0, 12), min_size=1, max_size=4),
        st.lists(
            st.one_of(
                st.tuples(st.just("join"), st.integers(0, 12)),
                st.tuples(st.just("leave"), st.integers(0, 5)),
                st.tuples(st.just("wait"), st.integers(1, 5)),
            ),
            max_size=20,
        ),
    )
    def test_totals(self, limits: list[int], steps: list[tuple[str, int]]) -> None:
        """B11: each goes when its own time is over; the builder is killed with the last."""
        clock, killed, gone = Clock(), list[str](), list[int]()
        waiting: dict[int, float] = {}

        def left(who: Any, reason: str) -> None:
            gone.append(who)

        patience = Patience(clock, left)

        def join(who: int, limit: int) -> None:
            waiting[who] = clock.seconds() + limit if limit else float("inf")
            patience.join(who, ClientOptions(timeout=limit, max_silent_time=0))

        for who, limit in enumerate(limits):
            join(who, limit)
        patience.begin(killed.append)
        expected: list[int] = []
        for number, (what, value) in enumerate(steps, len(limits)):
            if what == "join":
                join(number, value)
            elif what == "leave" and len(waiting) > 1:
                who = sorted(waiting)[value % len(waiting)]
                del waiting[who]
                patience.leave(who)
            for _ in range(value if what == "wait" else 0):
                clock.advance(1)
                over = sorted((t, w) for w, t in waiting.items() if t <= clock.seconds())
                for _, who in over:
                    if len(waiting) > 1:
                        del waiting[who]
                        expected.append(who)
            self.assertEqual(sorted(gone), sorted(expected))
            late = all(time <= clock.seconds() for time in waiting.values())
            self.assertEqual(len(killed), late)
            if late:
                break
        patience.end()
        self.assertEqual(clock.getDelayedCalls(), [])

    def test_sizes(self) -> None:
        """B13: all that was written counts, also for who comes later; rounds count apart."""
        clock, killed, gone = Clock(), list[str](), list[Any]()
        patience = Patience[str](clock, lambda who, reason: gone.append((who, reason)))
        patience.join("a", ClientOptions(timeout=0, max_silent_time=0, max_log_size=100))
        patience.begin(killed.append)
        patience.heard(90)
        patience.end()
        patience.begin(killed.append)
        patience.heard(60)
        patience.join("b", ClientOptions(timeout=0, max_silent_time=0, max_log_size=50))
        ((who, reason),) = gone
        self.assertEqual(who, "b")
        self.assertIn("wrote more than 50 bytes of log", reason)
        self.assertEqual(killed, [])
        patience.heard(60)
        (reason,) = killed
        self.assertIn("wrote more than 100 bytes of log", reason)
        patience.end()
        self.assertEqual(clock.getDelayedCalls(), [])
