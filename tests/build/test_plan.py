"""Planning large graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.available import Available
from guixd.build.plan import Planner
from guixd.build.request import Wanted
from guixd.build.threads import inline
from guixd.errors import Busy
from guixd.formats.path import StorePath
from guixd.store.items import Registration
from tests.build.fakes import FakeLauncher, FakeSubstitutes
from tests.build.graph import World


class _Ticking(Clock):
    """Time that passes with every look at it."""

    pauses = 0

    def seconds(self) -> float:
        self.rightNow += 0.001
        return self.rightNow

    def callLater(self, *arguments: Any, **named: Any) -> Any:
        self.pauses += 1
        return super().callLater(*arguments, **named)


class PlanTests(SynchronousTestCase):
    """What a request needs."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.world = World(self, users=0, launcher=FakeLauncher(), clock=self.clock, threads=inline)

    def test_long_chain(self) -> None:
        """A chain far deeper than any stack is planned; others get their turn meanwhile."""
        world = self.world
        chain: list[StorePath] = []
        for number in range(1200):
            chain.append(world.derive(f"n{number}", inputs=chain[-1:]))
        clock = _Ticking()
        planner = Planner(clock, inline, world.store, world.roots)
        planning = Deferred.fromCoroutine(planner.plan([Wanted(chain[-1])]))
        while not planning.called:
            clock.advance(0)
        self.successResultOf(planning)
        self.assertGreater(clock.pauses, 100)
        self.assertEqual(len(planner.goals), 1200)
        self.assertEqual([g.path for g in planner.goals.values() if not g.pending], chain[:1])
        self.assertLessEqual(set(chain), world.roots.paths)

    def test_only_what_is_missing(self) -> None:
        """Nothing below a valid output is looked at."""
        world = self.world
        deep = world.derive("deep")
        made = world.derive("made", inputs=[deep])
        top = world.derive("top", inputs=[made])

        output = world.output(made)
        Path(output).write_text("x")
        world.store.register([Registration(output, bytes(32), 120)])
        planner = Planner(self.clock, inline, world.store, world.roots)

        self.successResultOf(Deferred.fromCoroutine(planner.plan([Wanted(top)])))
        self.assertEqual(list(planner.goals), [top])

    def test_nothing_to_do(self) -> None:
        """A derivation whose outputs are valid is not even read, but protected with them."""
        world = self.world
        made = world.derive("made")
        output = world.output(made)
        Path(output).write_text("x")
        world.store.register([Registration(output, bytes(32), 120)])
        world.store._derivations.forget(made)
        Path(made).unlink()
        world.roots = world.store.temp_roots()
        planner = Planner(self.clock, inline, world.store, world.roots)
        self.successResultOf(Deferred.fromCoroutine(planner.plan([Wanted(made)])))
        self.assertEqual(planner.goals, {})
        self.assertEqual({made, output}, world.roots.paths)

    def test_downloads(self) -> None:
        """G19: what is downloaded is protected with all that belongs or is referred to."""
        world = self.world
        library = world.derive("library")
        drv = world.derive("two", outputs=("out", "lib"))
        there, here = world.output(drv), world.output(drv, "lib")
        item = world.output(world.derive("item"))
        Path(here).write_text("x")
        world.store.register([Registration(here, bytes(32), 120)])
        offers = FakeSubstitutes()
        offers.offer(there, world.output(library), here)
        for path in item, world.output(library):
            offers.offer(path)
        available = Available(offers.offers)
        world.roots = world.store.temp_roots()
        planner = Planner(self.clock, inline, world.store, world.roots, available=available)
        wanted = Wanted(drv), Wanted(item)
        self.successResultOf(Deferred.fromCoroutine(planner.plan(wanted)))
        self.assertEqual(planner.goals.keys(), offers.offers.keys())
        self.assertEqual(world.roots.paths, {drv, here, *offers.offers})

    def test_collector_in_the_way(self) -> None:
        """While a collector reads the roots, planning waits and goes on afterwards."""
        world = self.world
        drv = world.derive("a")
        busy = [True, True, False]

        class Roots:
            def add(self, path: StorePath) -> None:
                if busy and busy.pop(0):
                    raise Busy("collecting")

        planner = Planner(self.clock, inline, world.store, Roots())
        planning = Deferred.fromCoroutine(planner.plan([Wanted(drv)]))
        self.assertNoResult(planning)
        self.clock.pump([0.1, 0.1])
        self.successResultOf(planning)
        self.assertEqual(list(planner.goals), [drv])
