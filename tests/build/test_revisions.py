"""Requests whose plan changes while they are carried out (spec: build §3)."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.request import BuildRequest, ClientOptions, Wanted
from guixd.build.threads import inline
from guixd.errors import BuildError
from guixd.formats import derivation
from guixd.formats.path import StorePath
from tests.build.fakes import FakeLauncher, FakeSubstitutes
from tests.build.graph import Recorder, World


class Case(SynchronousTestCase):
    """A world without processes, threads, time and servers."""

    def setUp(self) -> None:
        self.launcher = FakeLauncher()
        self.downloads = FakeSubstitutes()
        self.clock = Clock()
        self.world = World(
            self,
            users=8 if os.geteuid() == 0 else 0,
            launcher=self.launcher,
            threads=inline,
            clock=self.clock,
            substitutes=self.downloads,
        )
        self.downloads.store = self.world.store

    def slow_down(self) -> None:
        """Let each search for substitutes take some time."""
        find = self.downloads.find

        async def find_slowly(*arguments: Any) -> Any:
            self.clock.advance(0.01)
            return await find(*arguments)

        self.patch(self.downloads, "find", find_slowly)

    def offered(self, drv: StorePath, *references: StorePath) -> StorePath:
        """Let there be a substitute for the output of DRV; return DRV."""
        self.downloads.offer(self.world.output(drv), *references)
        return drv

    def item(self, name: str) -> StorePath:
        """Return a path at which nothing is."""
        return self.world.store.directory.child("1" * 32 + "-" + name)

    def request(self, *wanted: StorePath, **options: object) -> Deferred[None]:
        """Ask for WANTED, which may be items that are no derivations."""
        asked = tuple(Wanted(path) for path in wanted)
        options.setdefault("max_jobs", 4)
        request = BuildRequest(asked, options=ClientOptions(**options), roots=self.world.roots)  # type: ignore[arg-type]
        return self.world.engine.build(request, Recorder())

    def error(self, building: Deferred[None]) -> BuildError:
        error = self.failureResultOf(building, BuildError).value
        assert isinstance(error, BuildError)
        return error


class Fallback(Case):
    """Downloads that fail (U18)."""

    def test_at_once(self) -> None:
        """U18: what cannot be downloaded is built while other downloads and builds go on."""
        bad, good = (self.offered(self.world.derive(name)) for name in ("bad", "good"))
        slow = self.world.derive("slow")
        top = self.world.derive("top", inputs=[bad])
        building = self.request(top, good, slow, fallback=True)
        self.assertEqual(sorted(self.downloads.running), ["bad", "good"])
        self.downloads["bad"].fail()
        self.assertEqual(self.launcher.running, ["slow", "bad"])
        self.assertEqual(self.downloads.running, ["good"])
        self.launcher["bad"].finish()
        self.assertEqual(self.launcher.running, ["slow", "top"])
        for builder in "slow", "top":
            self.launcher[builder].finish()
        self.assertNoResult(building)
        self.downloads["good"].finish()
        self.successResultOf(building)
        self.assertEqual(sorted(self.downloads.names), ["bad", "good"])
        self.assertEqual(self.launcher.names, ["slow", "bad", "top"])

    def test_what_it_needs(self) -> None:
        """U18: inputs of what is built instead are downloaded; what needed it is built, too."""
        library = self.offered(self.world.derive("library"))
        bad = self.offered(self.world.derive("bad", inputs=[library]))
        user = self.world.derive("user", inputs=[bad])
        self.offered(user, self.world.output(bad))
        building = self.request(user, fallback=True)
        self.assertEqual(self.downloads.running, ["bad"])
        self.downloads["bad"].fail()
        self.assertEqual(self.downloads.running, ["library"])
        self.downloads["library"].finish()
        self.launcher["bad"].finish()
        # Now there is all that the substitute of the last one refers to.
        self.assertEqual(self.downloads.running, ["user"])
        self.downloads["user"].finish()
        self.successResultOf(building)
        self.assertEqual(self.launcher.names, ["bad"])

    def test_several(self) -> None:
        """U18: each of many failures is replaced by one build, whatever the order."""
        drvs = [self.offered(self.world.derive(f"a{number}")) for number in range(5)]
        building = self.request(*drvs, fallback=True, max_jobs=9)
        for number in 3, 0, 4, 1, 2:
            self.downloads[f"a{number}"].fail()
        self.assertEqual(sorted(self.launcher.names), [f"a{number}" for number in range(5)])
        for number in range(5):
            self.launcher[f"a{number}"].finish()
        self.successResultOf(building)

    def test_many_in_a_row(self) -> None:
        """B39, U18: what fails while planning rests is replaced by one new plan."""
        self.slow_down()
        drvs = [self.offered(self.world.derive(f"a{number}")) for number in range(8)]
        building = self.request(*drvs, fallback=True, max_jobs=8)
        building.addErrback(lambda _: None)
        self.clock.advance(0)
        for number in range(8):
            self.downloads[f"a{number}"].fail()
        self.assertEqual((self.downloads.searches, self.launcher.names), (1, []))
        self.clock.pump([1, 0])
        self.assertEqual((self.downloads.searches, len(self.launcher.running)), (1, 8))
        building.cancel()

    def test_failed_builds_are_not_repeated(self) -> None:
        """B3, U18: with keep-going, a new plan does not try again what has failed."""
        broken = self.world.derive("broken")
        bad = self.offered(self.world.derive("bad"))
        building = self.request(broken, bad, fallback=True, keep_going=True)
        self.launcher["broken"].finish(1)
        self.downloads["bad"].fail()
        self.launcher["bad"].finish()
        error = self.error(building)
        self.assertEqual((error.status, error.text), (100, f"build of `{broken}' failed"))
        self.assertEqual(self.launcher.names, ["broken", "bad"])

    def test_without(self) -> None:
        """U18: without it the request fails, and what needs the item is not built."""
        library = self.offered(self.world.derive("library"))
        user = self.offered(self.world.derive("user", inputs=[library]), self.world.output(library))
        other = self.world.derive("other")
        building = self.request(user, other, keep_going=True)
        self.downloads["library"].fail()
        self.assertNoResult(building)
        self.launcher["other"].finish()
        self.assertEqual(self.error(building).text, f"build of `{self.world.output(user)}' failed")
        self.assertEqual(self.launcher.names, ["other"])

    def test_item_itself(self) -> None:
        """U18: an item that was asked for itself cannot be built instead."""
        building = self.request(self.downloads.offer(self.item("item")), fallback=True)
        self.downloads["item"].fail()
        self.assertEqual(self.error(building).text, "no item")


class Collected(Case):
    """What collectors take away between the search and the plan."""

    def test_reference(self) -> None:
        """U17: what has gone since the search is downloaded, too."""
        world = self.world
        reference = world.text("reference", "x")
        item = self.downloads.offer(self.item("item"), reference)
        self.downloads.offer(reference)
        add, gone = world.roots.add, []

        def protect(path: StorePath) -> None:
            if not gone:
                gone.append(path)
                world.store.database.invalidate(reference)
                os.unlink(reference)
            add(path)

        self.patch(world.roots, "add", protect)
        building = self.request(item)
        self.assertEqual(self.downloads.running, ["reference"])
        self.downloads["reference"].finish()
        self.downloads["item"].finish()
        self.successResultOf(building)
        self.assertLessEqual({item, reference}, world.roots.paths)


class Retry(Case):
    """Substitutes that refer to what nobody has (U17)."""

    def test_after_the_inputs(self) -> None:
        """U17: when all that it is built from is there, substitutes are looked for once more."""
        library, tool = self.world.derive("library"), self.world.derive("tool")
        user = self.world.derive("user", inputs=[library, tool])
        self.offered(user, self.world.output(library))
        building = self.request(user)
        self.launcher["library"].finish()
        self.assertEqual(self.downloads.names, [])
        self.launcher["tool"].finish()
        self.assertEqual(self.downloads.running, ["user"])
        self.downloads["user"].finish()
        self.successResultOf(building)
        self.assertEqual(self.launcher.names, ["library", "tool"])

    def test_without_rest(self) -> None:
        """B39, U17: planning does not rest before that."""
        self.slow_down()
        library = self.world.derive("library")
        user = self.world.derive("user", inputs=[library])
        building = self.request(self.offered(user, self.world.output(library)))
        self.clock.pump([0] * 3)
        self.launcher["library"].finish()
        self.clock.pump([0] * 3)
        self.downloads["user"].finish()
        self.successResultOf(building)

    def test_references_as_well(self) -> None:
        """U17: the second time, what else it refers to is downloaded, too."""
        library = self.world.derive("library")
        extra = self.downloads.offer(self.item("extra"), self.world.output(library))
        user = self.world.derive("user", inputs=[library])
        self.offered(user, extra)
        building = self.request(user)
        self.launcher["library"].finish()
        self.assertEqual(self.downloads.running, ["extra"])
        self.downloads["extra"].finish()
        self.downloads["user"].finish()
        self.successResultOf(building)

    def test_once(self) -> None:
        """U17: if it still lacks something, it is built, and nobody looks again."""
        library = self.world.derive("library")
        user = self.offered(self.world.derive("user", inputs=[library]), self.item("nowhere"))
        building = self.request(user)
        before = self.downloads.searches
        self.launcher["library"].finish()
        self.assertEqual(self.launcher.running, ["user"])
        self.assertGreater(self.downloads.searches, before)
        before = self.downloads.searches
        self.launcher["user"].finish()
        self.successResultOf(building)
        self.assertEqual((self.downloads.names, self.downloads.searches), ([], before))

    def test_second_failure(self) -> None:
        """U17, U18: a download that fails the second time ends the request, or is built."""
        for fallback in False, True:
            library = self.world.derive(f"library{fallback}")
            user = self.world.derive(f"user{fallback}", inputs=[library])
            self.offered(user, self.world.output(library))
            building = self.request(user, fallback=fallback)
            self.launcher[f"library{fallback}"].finish()
            self.downloads[f"user{fallback}"].fail()
            if fallback:
                self.launcher["userTrue"].finish()
                self.successResultOf(building)
            else:
                self.assertIn("--fallback", self.error(building).text)

    def test_a_build_that_runs_goes_on(self) -> None:
        """U17: what is being built is not downloaded after all."""
        library, tool = self.world.derive("library"), self.world.derive("tool")
        first = self.world.derive("first", inputs=[tool])
        second = self.world.derive("second", inputs=[library])
        for drv in first, second:
            self.offered(drv, self.world.output(library))
        building = self.request(first, second)
        self.launcher["tool"].finish()
        self.assertEqual(self.launcher.running, ["library", "first"])
        self.launcher["library"].finish()
        self.assertEqual(self.downloads.running, ["second"])
        self.assertEqual(self.launcher.running, ["first"])
        self.launcher["first"].finish()
        self.downloads["second"].finish()
        self.successResultOf(building)
        self.assertEqual(self.downloads.names, ["second"])

    def begin(self, tag: str = "", **options: object) -> Deferred[None]:
        """Ask for FIRST, which is built as its substitute lacks LIBRARY, and for SECOND.

        When LIBRARY is there, SECOND has a substitute that refers to FIRST.
        """
        library = self.world.derive(f"library{tag}")
        first = self.offered(self.world.derive(f"first{tag}"), self.world.output(library))
        second = self.world.derive(f"second{tag}", inputs=[library])
        building = self.request(first, self.offered(second, self.world.output(first)), **options)
        self.launcher[f"library{tag}"].finish()
        return building

    def test_what_is_being_built(self) -> None:
        """U17: what a build makes already is waited for, not downloaded for what refers to it."""
        building = self.begin()
        self.assertEqual((self.launcher.running, self.downloads.names), (["first"], []))
        self.launcher["first"].finish()
        self.assertEqual(self.downloads.running, ["second"])
        self.downloads["second"].finish()
        self.successResultOf(building)

    def test_one_of_two_outputs(self) -> None:
        """U17, U18: a build waits for what is downloaded of its outputs, and makes the rest."""
        for fails in False, True:
            variables = {"outputs": "out lib"}
            two = self.world.derive(f"two{fails}", outputs=("out", "lib"), environment=variables)
            user = self.offered(self.world.derive(f"user{fails}"), self.world.output(two, "lib"))
            self.downloads.offer(self.world.output(two, "lib"))
            building = self.request(two, user, fallback=True)
            self.assertEqual(self.downloads.running, [f"two{fails}-lib"])
            self.assertEqual(self.launcher.running, [])
            download = self.downloads[f"two{fails}-lib"]
            if fails:
                download.fail()
                self.assertEqual(self.launcher.running, ["twoTrue", "userTrue"])
                self.launcher["userTrue"].finish()
            else:
                download.finish()
                self.downloads["userFalse"].finish()
            self.launcher[f"two{fails}"].finish()
            self.successResultOf(building)

    def test_what_could_not_be_built(self) -> None:
        """B3, U17: what a failed build should have made is not downloaded after all."""
        for fallback in False, True:
            building = self.begin(f"{fallback}", keep_going=True, fallback=fallback)
            self.launcher[f"first{fallback}"].finish(1)
            if fallback:
                self.launcher["secondTrue"].finish()
            self.assertIn(f"-first{fallback}.drv'", self.error(building).text)
            self.assertEqual(self.downloads.names, [])


class MissingDerivation(Case):
    """Derivations that are not there, but can be had."""

    def setUp(self) -> None:
        super().setUp()
        self.drv = self.world.derive("absent")
        self.text = Path(self.drv).read_text()
        self.world.store.database.invalidate(self.drv)
        os.unlink(self.drv)
        self.downloads.offer(self.drv, self.world.shell)

    def test_others_go_on(self) -> None:
        """U17: it is downloaded while other things are built, and then built."""
        other = self.world.derive("other")
        building = self.request(self.drv, other)
        self.assertEqual(self.launcher.running, ["other"])
        self.downloads["absent.drv"].finish(self.text)
        self.assertEqual(self.launcher.running, ["other", "absent"])
        for name in "other", "absent":
            self.launcher[name].finish()
        self.successResultOf(building)

    def test_its_output_is_offered(self) -> None:
        """U17: once it can be read, its outputs may be downloaded."""
        output = self.downloads.offer(
            derivation.parse(self.text.encode(), self.world.store.directory).outputs["out"].path
        )
        building = self.request(self.drv)
        self.downloads["absent.drv"].finish(self.text)
        self.assertEqual(self.downloads.running, ["absent"])
        self.downloads["absent"].finish()
        self.successResultOf(building)
        self.assertTrue(self.world.store.is_valid(output))

    def test_without_fallback(self) -> None:
        """U18: a derivation that cannot be downloaded ends the request."""
        other = self.world.derive("other")
        building = self.request(self.drv, other)
        self.downloads["absent.drv"].fail()
        self.assertIn("no absent.drv", self.error(building).text)
        self.assertTrue(self.launcher["other"].killed)

    def test_fallback(self) -> None:
        """U18: nothing makes a derivation whose download fails."""
        building = self.request(self.drv, fallback=True)
        self.downloads["absent.drv"].fail()
        self.assertEqual(self.error(building).text, f"build of `{self.drv}' failed")


class AnyGraph(Case):
    """Requests with any graph, any substitutes, and any course of events."""

    numbers = itertools.count()

    @settings(max_examples=80, deadline=None)
    @given(st.data())
    def test_fallback(self, data: st.DataObject) -> None:
        """U17, U18: with fallback all is made, nothing twice, whatever cannot be downloaded."""
        number = next(self.numbers)
        self.downloads.started.clear()
        self.launcher.started.clear()
        drvs: list[StorePath] = []
        above: list[StorePath] = []
        outputs: dict[str, list[str]] = {}
        for index in range(data.draw(st.integers(1, 6))):
            name = f"n{number}-{index}"
            inputs = data.draw(st.sets(st.sampled_from(drvs), max_size=3)) if drvs else set()
            names = data.draw(st.sampled_from([("out",), ("out", "lib")]))
            drv = self.world.derive(
                name,
                inputs=sorted(inputs),
                outputs=names,
                environment={"outputs": " ".join(names)},
            )
            made_by_it = [self.world.output(drv, each) for each in names]
            for output in made_by_it:
                if data.draw(st.booleans()):
                    some = data.draw(st.sets(st.sampled_from(above), max_size=2)) if above else ()
                    lacks = [self.item("nowhere")] if data.draw(st.integers(0, 4)) == 0 else []
                    self.downloads.offer(output, *sorted(some), *lacks)
            drvs.append(drv)
            above += made_by_it
            outputs[name] = [output.name for output in made_by_it]
        wanted = data.draw(st.lists(st.sampled_from(drvs), min_size=1, max_size=3))
        jobs = data.draw(st.integers(1, 3))
        building = self.request(
            *wanted, fallback=True, max_jobs=jobs, keep_going=data.draw(st.booleans())
        )
        try:
            while not building.called:
                going = [*self.downloads.running, *self.launcher.running]
                making = [*self.downloads.running]
                making += [each for name in self.launcher.running for each in outputs[name]]
                self.assertEqual(sorted(making), sorted(set(making)))
                self.assertLessEqual(len(self.launcher.running), jobs)
                name = data.draw(st.sampled_from(going))
                downloads = name in self.downloads.running
                if downloads and data.draw(st.booleans()):
                    self.downloads[name].fail()
                else:
                    (self.downloads if downloads else self.launcher)[name].finish()
        finally:
            if not building.called:  # the example was given up
                building.addErrback(lambda _: None)
                building.cancel()
        self.successResultOf(building)
        self.assertTrue(all(map(self.world.is_valid, wanted)))
        self.assertEqual((self.downloads.running, self.launcher.running), ([], []))
        built = self.launcher.names
        self.assertEqual(sorted(built), sorted(set(built)))
        tried = [each.path.name for each in self.downloads.started if not each.dropped]
        self.assertEqual(sorted(tried), sorted(set(tried)))
