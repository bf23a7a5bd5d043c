"""The order of goals, and the durations it comes from."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from guixd.build import durations
from guixd.build.chains import rank
from guixd.build.durations import Durations
from guixd.build.plan import Goal
from guixd.build.threads import inline
from guixd.formats.path import StoreDirectory
from tests.build.fakes import FakeLauncher
from tests.build.graph import Recorder, World
from tests.support import DirectoryTestCase, temporary_directory

STORE = StoreDirectory("/s")


def _graph(edges: list[tuple[int, int]], size: int) -> list[Goal]:
    """Return goals, each needed by those of greater number that EDGES name."""
    goals = [Goal(STORE.child(f"{'x' * 32}-{n}"), None) for n in range(size)]
    for one, other in edges:
        low, high = sorted((one % size, other % size))
        if low != high:
            goals[low].dependents.append(goals[high])
            goals[high].pending += 1
    return goals


class ChainTests(SynchronousTestCase):
    """Which goal comes first."""

    @settings(deadline=None, max_examples=100)
    @given(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=25),
        st.lists(st.integers(1, 9), min_size=1, max_size=10),
    )
    def test_longest_chain(self, edges: list[tuple[int, int]], seconds: list[int]) -> None:
        """B9: what is waited for first, then the longest chain of builds, then the name."""
        goals = _graph(edges, len(seconds))
        for _ in rank(goals, lambda name: seconds[int(name)]):
            pass

        def chain(goal: Goal) -> int:
            after = max((chain(d) for d in goal.dependents), default=0)
            return after + seconds[int(goal.path.name)]

        for goal in goals:
            expected = (not goal.dependents, -chain(goal), goal.path.name, goal.path)
            self.assertEqual(goal.priority, expected)

    def test_circle(self) -> None:
        """Goals that wait for each other are ranked anyhow: they never become ready."""
        one, other = goals = _graph([(0, 1)], 2)
        other.dependents.append(one)
        one.pending += 1
        for _ in rank(goals, lambda name: 1):
            pass
        self.assertEqual((one.priority, other.priority), ((), ()))


class OrderTests(SynchronousTestCase):
    """The order in which an engine starts builds."""

    def setUp(self) -> None:
        self.launcher = FakeLauncher()
        self.clock = Clock()
        self.world = World(
            self,
            users=4 if os.geteuid() == 0 else 0,
            launcher=self.launcher,
            threads=inline,
            clock=self.clock,
        )

    def test_top_goes_last(self) -> None:
        """B9: what others need goes before what is only wanted itself."""
        world = self.world
        a, b = world.derive("a"), world.derive("b")
        building = world.build(a, world.derive("top", inputs=[b]))
        while self.launcher.running:
            self.launcher.started[-1].finish()
        self.successResultOf(building)
        self.assertEqual(self.launcher.names, ["b", "a", "top"])

    def test_known_durations(self) -> None:
        """B9: what took long before begins first the next time, also in another daemon."""
        world = self.world
        building = world.build(world.derive("z", environment={"version": "1"}))
        self.clock.advance(40)
        self.launcher["z"].finish()
        self.successResultOf(building)
        self.clock.advance(durations.WRITE_AFTER)
        file = Path(world.settings.directories.state, "build-durations")
        self.assertEqual(json.loads(file.read_text()), {"z.drv": 40.0})
        for engine in world.engine, world.another_engine():
            del self.launcher.started[:]
            version = str(id(engine))
            drvs = [world.derive(n, environment={"version": version}) for n in "az"]
            world.engine = engine
            building = world.build(*drvs)
            while self.launcher.running:
                self.launcher.started[-1].finish()
            self.successResultOf(building)
            self.assertEqual(self.launcher.names, ["z", "a"])

    def _calls(self, size: int) -> int:
        """Return how many functions are called to finish some builds of SIZE."""
        world = self.world
        drvs = [world.derive(f"{size}-{n:04}", builder="/b") for n in range(size)]
        building = world.build(*drvs, max_jobs=2, observer=Recorder())
        count = 0

        def profile(_frame: Any, event: str, _argument: Any) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(profile)
        try:
            for _ in range(20):
                self.launcher[self.launcher.running[0]].finish()
        finally:
            sys.setprofile(None)
        building.addErrback(lambda _: None)
        building.cancel()
        self.launcher.started.clear()
        return count

    def test_cost_of_a_finished_build(self) -> None:
        """B9: to go on after a build costs the same whether few or many others wait."""
        few, many = self._calls(30), self._calls(600)
        self.assertLess(many, 1.2 * few)


class DurationTests(DirectoryTestCase):
    """The file of durations."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()

    def durations(self) -> Durations:
        known = Durations(self.clock, inline, self.at("durations"))
        known.load()
        return known

    def test_kept(self) -> None:
        """What took longer than usual is written some time later, or at the end."""
        known = self.durations()
        known.note("short", 0.5)
        self.assertEqual(self.clock.calls, [])
        known.note("long", 10)
        known.note("long", 30)
        self.assertEqual(os.listdir(self.directory), [])
        known.note("longer", 99)
        self.clock.advance(durations.WRITE_AFTER)
        again = self.durations()
        self.assertEqual([again.of(n) for n in ("short", "long", "longer")], [1, 20, 99])
        again.note("long", 0.1)
        again.stop()
        self.assertEqual(self.durations().of("long"), 10.1)
        self.assertEqual(os.listdir(self.directory), ["durations"])

    def test_bounded(self) -> None:
        """Only the newest are kept, so that the file stays small."""
        known = self.durations()
        for number in range(durations.MOST_NAMES + 10):
            known.note(f"{number}-{'x' * 200}", 5)
        known.stop()
        self.assertLess(os.path.getsize(self.at("durations")), durations.LARGEST_FILE)
        again = self.durations()
        self.assertEqual(again.of(f"9-{'x' * 200}"), durations.USUAL)
        self.assertEqual(again.of(f"10-{'x' * 200}"), 5)

    def test_link(self) -> None:
        """A link in place of the file is not followed."""
        target = Path(temporary_directory(self), "target")
        target.write_text('{"a": 7.0}')
        os.symlink(target, self.at("durations"))
        self.assertEqual(self.durations().of("a"), durations.USUAL)

    @settings(deadline=None, max_examples=60)
    @given(
        st.one_of(
            st.binary(max_size=50),
            st.sampled_from([b"[" * 100_000, b'{"a": NaN}', b'{"a": 1e999}', b"{}" + b" " * 2**20]),
            st.dictionaries(
                st.text(max_size=5), st.one_of(st.none(), st.text(), st.integers(), st.floats())
            ).map(lambda value: json.dumps(value).encode()),
        )
    )
    def test_damaged(self, content: bytes) -> None:
        """Whatever the file has, all durations are sensible, and new ones are kept."""
        Path(self.at("durations")).write_bytes(content)
        known = self.durations()
        for name in ("a", *known._seconds):
            self.assertTrue(durations.USUAL <= known.of(name) <= durations.LONGEST)
        known.note("b", 5)
        known.stop()
        self.assertGreater(self.durations().of("b"), 1)
