"""Requests, with builders that the tests play."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ProcessDone
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from guixd.build import verdicts
from guixd.build.request import BuildRequest, Wanted
from guixd.build.threads import inline
from guixd.errors import BuildError
from tests.build.fakes import FakeLauncher
from tests.build.graph import Recorder, World


class Fake(SynchronousTestCase):
    """A world without processes, threads and time."""

    def setUp(self) -> None:
        self.launcher = FakeLauncher()
        self.clock = Clock()
        self.world = World(
            self,
            users=8 if os.geteuid() == 0 else 0,
            launcher=self.launcher,
            threads=inline,
            clock=self.clock,
        )

    def error(self, building: Deferred[None]) -> BuildError:
        """Return the error that BUILDING failed with."""
        error = self.failureResultOf(building, BuildError).value
        assert isinstance(error, BuildError)
        return error


class RequestTests(Fake):
    """What a request builds, and how it ends."""

    def test_valid_outputs(self) -> None:
        """B1: nothing is built or printed for valid outputs."""
        world, observer = self.world, Recorder()
        drv = world.derive("a")
        building = world.build(drv)
        self.launcher["a"].finish()
        self.successResultOf(building)
        self.successResultOf(world.build(drv, observer=observer))
        self.assertEqual(self.launcher.names, ["a"])
        self.assertEqual(observer.events, [])

    def test_traces(self) -> None:
        """B29: start and success are told with log file and pid."""
        world, observer = self.world, Recorder()
        drv = world.derive("a")
        building = world.build(drv, observer=observer)
        self.launcher["a"].say("hello\n")
        self.launcher["a"].finish()
        self.successResultOf(building)
        log = f"{world.settings.directories.log}/drvs/{drv.base[:2]}/{drv.base[2:]}.gz"
        self.assertEqual(
            observer.events[1:],
            [
                ("trace", f"@ build-started {drv} - {world.settings.system} {log} 1000"),
                ("output", b"hello\n"),
                ("trace", f"@ build-succeeded {drv} -"),
            ],
        )

    def test_order_and_inputs(self) -> None:
        """B9: inputs come first; what is ready goes by name, within max-jobs."""
        world = self.world
        c, a, b = (world.derive(n) for n in "cab")
        top = world.derive("top", inputs=[a, b, c])
        building = world.build(top, max_jobs=2)
        self.assertEqual(self.launcher.running, ["a", "b"])
        self.launcher["a"].finish()
        self.assertEqual(self.launcher.running, ["b", "c"])
        self.launcher["c"].finish()
        self.assertEqual(self.launcher.running, ["b"])
        self.launcher["b"].finish()
        self.assertEqual(self.launcher.running, ["top"])
        self.launcher["top"].finish()
        self.successResultOf(building)
        self.assertTrue(world.is_valid(top))

    def test_same_derivation_twice(self) -> None:
        """B6: a derivation wanted several times, by name and as an input, is built once."""
        world = self.world
        a = world.derive("a")
        building = world.build(a, world.derive("b", inputs=[a]), a, max_jobs=4)
        self.launcher["a"].finish()
        self.launcher["b"].finish()
        self.successResultOf(building)
        self.assertEqual(self.launcher.names, ["a", "b"])

    def test_items_that_are_no_derivations(self) -> None:
        """B5: a path that nothing provides is passed over."""
        world = self.world
        path = world.store.directory.child("1" * 32 + "-x")
        request = BuildRequest((Wanted(path),), roots=world.roots)
        self.successResultOf(world.engine.build(request, Recorder()))
        self.assertFalse(world.store.is_valid(path))

    def test_unknown_output_names(self) -> None:
        """A name that is no output is passed over; an output asked for brings all."""
        world = self.world
        drv = world.derive("a", outputs=("out", "lib"), environment={"outputs": "out lib"})

        def build(*names: str) -> Deferred[None]:
            wanted = Wanted(drv, frozenset(names))
            return world.engine.build(BuildRequest((wanted,), roots=world.roots), Recorder())

        self.successResultOf(build("nope"))
        self.assertEqual(self.launcher.names, [])
        building = build("lib")
        self.launcher["a"].finish()
        self.successResultOf(building)
        self.assertTrue(world.is_valid(drv, "lib") and world.is_valid(drv, "out"))
        info = world.store.database.path_info(world.output(drv, "lib"))
        self.assertEqual(info.deriver, drv)

    def test_missing_derivation(self) -> None:
        """A derivation that is not there: status 1, its name in the error."""
        path = self.world.store.directory.child("1" * 32 + "-x.drv")
        observer = Recorder()
        error = self.error(self.world.build(path, observer=observer))
        self.assertEqual(error.status, 1)
        self.assertIn(path, error.text)
        self.assertIn("cannot build missing derivation", observer.logs[0])

    def test_unknown_output_of_an_input(self) -> None:
        """D25: the error names the derivation and the output."""
        world = self.world
        a = world.derive("a")
        b = world.derive("b", inputs={a: ("out", "doc")})
        building = world.build(b)
        self.launcher["a"].finish()
        error = self.error(building)
        self.assertIn(a, error.text)
        self.assertIn("doc", error.text)
        self.assertEqual(self.launcher.names, ["a"])

    def test_missing_source(self) -> None:
        """D27: a source that is gone is a dependency that could not be built."""
        world = self.world
        source = world.text("source", "x")
        drv = world.derive("a", sources=[source])
        world.store.database._connection.execute("PRAGMA foreign_keys = off")
        world.store.database._connection.execute(
            "DELETE FROM ValidPaths WHERE path = ?", (str(source),)
        )
        world.store.database._forget()
        observer = Recorder()
        error = self.error(world.build(drv, observer=observer))
        self.assertEqual(error.status, 1)
        self.assertIn("1 dependencies couldn't be built", observer.logs[0])
        self.assertEqual(self.launcher.names, [])

    def test_without_jobs(self) -> None:
        """B9, B10: max-jobs 0 builds what is local; with anything else left it is an error."""
        world = self.world
        local = world.derive("local", environment={"preferLocalBuild": "1"})
        other = world.derive("other", inputs=[local])
        building = world.build(other, max_jobs=0)
        self.launcher["local"].finish()
        error = self.error(building)
        self.assertIn("--max-jobs", error.text)
        self.assertEqual(error.status, 1)
        self.assertTrue(world.is_valid(local))
        self.assertEqual(self.launcher.names, ["local"])

    def test_builtins(self) -> None:
        """B31, D22: an unknown builtin fails for good; known ones are not there yet."""
        world = self.world
        unknown = world.derive("a", builder="builtin:nope")
        self.assertEqual(self.error(world.build(unknown)).status, 100)
        known = world.derive("b", builder="builtin:download")
        error = self.error(world.build(known))
        self.assertEqual(error.status, 1)
        self.assertIn("not supported yet", error.text)
        self.assertEqual(world.leftovers(), [])


class RoomTests(SynchronousTestCase):
    """When the next build may begin."""

    def test_directories_are_removed_meanwhile(self) -> None:
        """B9, B35: the next build begins when outputs are valid; the answer waits for the rest."""
        launcher = FakeLauncher()
        later: list[Deferred[None]] = []

        def threads(function: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
            later.append(Deferred())
            return later[-1].addCallback(lambda _: function(*arguments))

        users = 1 if os.geteuid() == 0 else 0
        world = World(self, users=users, launcher=launcher, threads=threads, clock=Clock())
        later.pop().callback(None)  # the durations that are known
        a, b = world.derive("a"), world.derive("b")
        building = world.build(a, b)
        several = Path(launcher["a"].outside("/tmp/several"))
        several.mkdir()
        for number in range(200):
            (several / str(number)).touch()
        launcher["a"].finish()
        self.assertTrue(world.is_valid(a))
        self.assertEqual(launcher.running, ["b"])
        launcher["b"].finish()
        self.assertTrue(world.is_valid(b))
        self.assertNoResult(building)
        self.assertEqual(world.leftovers(), [f"{a.base}.chroot"])
        self.assertEqual(len(later), 1)
        later.pop().callback(None)
        self.successResultOf(building)
        self.assertEqual(world.leftovers(), [])

    def test_builds_that_end_at_once(self) -> None:
        """B9: any number of builds may follow each other without a pause."""
        launcher = FakeLauncher()
        users = 1 if os.geteuid() == 0 else 0
        world = World(self, users=users, launcher=launcher, threads=inline, clock=Clock())
        building = world.build(*(world.derive(f"b{number}") for number in range(150)))
        launcher.auto = {}
        launcher["b0"].finish()
        self.successResultOf(building)
        self.assertEqual(len(launcher.started), 150)


class FailureTests(Fake):
    """Builds that fail."""

    def test_exit_code(self) -> None:
        """B2: a failing builder gives 100, its text, a trace, and leaves nothing."""
        world, observer = self.world, Recorder()
        drv = world.derive("a")
        building = world.build(drv, observer=observer)
        self.launcher["a"].finish(3)
        error = self.error(building)
        self.assertEqual((error.status, error.text), (100, f"build of `{drv}' failed"))
        text = f"builder for `{drv}' failed with exit code 3"
        self.assertEqual(
            [event for event in observer.events if event[0] != "words"][-2:],
            [("log", 0, text), ("trace", f"@ build-failed {drv} - 1 {text}")],
        )
        self.assertEqual(world.leftovers(), [])

    def test_dependency(self) -> None:
        """B32: a failed input: 100, the user is not started, the top one is named."""
        world, observer = self.world, Recorder()
        bad, good = world.derive("bad"), world.derive("good")
        top = world.derive("top", inputs=[bad, good])
        building = world.build(top, observer=observer, max_jobs=2)
        self.launcher["bad"].finish(1)
        error = self.error(building)
        self.assertEqual((error.status, error.text), (100, f"build of `{top}' failed"))
        self.assertIn(
            f"cannot build derivation `{top}': 1 dependencies couldn't be built;"
            f" the first that failed is `{bad}'",
            observer.logs,
        )
        self.assertTrue(self.launcher["good"].killed)
        self.assertEqual(self.launcher.names, ["bad", "good"])

    def test_without_keep_going(self) -> None:
        """B4: when a wanted derivation fails the others are killed, without a trace."""
        world, observer = self.world, Recorder()
        a, b = world.derive("a"), world.derive("b")
        building = world.build(a, b, observer=observer, max_jobs=2)
        self.launcher["b"].finish(1)
        self.assertEqual(self.error(building).text, f"build of `{b}' failed")
        self.assertTrue(self.launcher["a"].killed)
        self.assertEqual([t for t in observer.traces if "failed" in t and a in t], [])
        self.assertEqual(world.leftovers(), [])

    def test_nothing_begins_in_vain(self) -> None:
        """B4: what waits for the slot of the one that fails does not begin; its old log stays."""
        world = self.world
        building = world.build(world.derive("a"), world.derive("b"), max_jobs=1)
        self.launcher["a"].finish(1)
        self.assertEqual(self.error(building).status, 100)
        self.assertEqual(self.launcher.names, ["a"])

    def test_first_of_two(self) -> None:
        """B4: of two that cannot be built for the same reason, one is named and told of."""
        world, observer = self.world, Recorder()
        bad = world.derive("bad")
        tops = [world.derive(name, inputs=[bad]) for name in ("one", "two")]
        building = world.build(*tops, observer=observer)
        self.launcher["bad"].finish(1)
        error = self.error(building)
        self.assertEqual([top for top in tops if top in error.text], tops[:1])
        told = [line for line in observer.logs if line.startswith("cannot build derivation")]
        self.assertEqual(len(told), 1)

    def test_first_of_several_at_once(self) -> None:
        """B4: what ends while the first failure waits for its turn is neither named nor counts."""
        world = self.world
        drvs = [world.derive(name) for name in "abc"]
        building = world.build(*drvs, max_jobs=3)
        with patch("guixd.build.turns.SLICE", -1):  # it is always the turn of others
            self.launcher["b"].finish(1)
            self.launcher["a"].finish(1)
            self.assertNoResult(building)
        self.clock.advance(0)
        self.assertEqual(self.error(building).text, f"build of `{drvs[1]}' failed")

    def test_keep_going(self) -> None:
        """B3: with keep-going all is tried, and the error names all that failed, sorted."""
        world, observer = self.world, Recorder()
        drvs = [world.derive(n) for n in "abc"]
        user = world.derive("user", inputs=[drvs[0], drvs[1]])
        building = world.build(*drvs, user, observer=observer, max_jobs=3, keep_going=True)
        self.launcher["a"].finish(1)
        self.launcher["b"].finish(1)
        self.assertNoResult(building)
        self.launcher["c"].finish()
        error = self.error(building)
        names = ", ".join(f"`{p}'" for p in sorted([drvs[0], drvs[1], user]))
        self.assertEqual((error.status, error.text), (100, f"build of {names} failed"))
        self.assertIn(
            f"cannot build derivation `{user}': 2 dependencies couldn't be built;"
            f" the first that failed is `{drvs[0]}'",
            observer.logs,
        )
        self.assertTrue(world.is_valid(drvs[2]))

    def test_status_order(self) -> None:
        """B2: 101 is above 100, which is above 1."""
        world = self.world
        failing, slow = world.derive("failing"), world.derive("slow")
        building = world.build(failing, slow, max_jobs=2, keep_going=True, timeout=10)
        self.launcher["failing"].finish(1)
        self.clock.advance(11)
        self.assertEqual(self.error(building).status, 101)

    def test_full_disk(self) -> None:
        """B36: a failure on a nearly full disk is put down to that, status 1."""
        self.patch(verdicts, "DISK_FULL", 1 << 60)
        observer = Recorder()
        building = self.world.build(self.world.derive("a"), observer=observer)
        self.launcher["a"].finish(1)
        self.assertEqual(self.error(building).status, 1)
        self.assertTrue(
            any("disk is nearly full" in line and " free" in line for line in observer.logs)
        )

    def _makes_fifo(self, name: str) -> None:
        """Let the builder NAME make what no store can have."""
        builder, ids = self.launcher[name], self.launcher[name].spec.ids
        fifo = builder.outside(dict(builder.spec.environment)["out"])
        os.mkfifo(fifo, 0o600)
        if ids is not None:
            os.chown(fifo, ids.uid, ids.gid)
        builder._end(ProcessDone(0))

    def test_general_error(self) -> None:
        """B40: trouble of one build is its text with status 1, and disturbs nobody else."""
        world, observer = self.world, Recorder()
        bad, other = world.derive("bad"), world.derive("other")
        building = world.build(bad, observer=observer)
        undisturbed = world.build(other)
        self._makes_fifo("bad")
        error = self.error(building)
        self.assertEqual(error.status, 1)
        self.assertIn("unsupported type", error.text)
        self.assertFalse([t for t in observer.traces if "build-failed" in t])
        self.launcher["other"].finish()
        self.successResultOf(undisturbed)

    def test_general_error_of_one(self) -> None:
        """B40: with keep-going guix is told what has ended, or it lists that as in progress."""
        world, observer = self.world, Recorder()
        bad, other = world.derive("bad"), world.derive("other")
        building = world.build(bad, other, observer=observer, keep_going=True, max_jobs=2)
        self._makes_fifo("bad")
        (told,) = [trace for trace in observer.traces if "build-failed" in trace]
        self.assertIn(f"@ build-failed {bad} - 1 file ", told)
        self.launcher["other"].finish()
        self.assertEqual(self.error(building).text, f"build of `{bad}' failed")

    def test_timeouts(self) -> None:
        """B11, B12, B13: silence, time and length of the log end a build with 101."""
        world = self.world
        for number, (options, steps, text) in enumerate(
            [
                ({"max_silent_time": 2}, [3], "2 seconds of silence"),
                ({"timeout": 5}, [1, 1, 1, 1, 1], "after 5 seconds"),
                ({"max_log_size": 3}, [1, 1, 1, 1], "3 bytes"),
            ]
        ):
            observer = Recorder()
            drv = world.derive(f"slow{number}")
            building = world.build(drv, observer=observer, **options)
            for step in steps:
                self.assertNoResult(building)
                self.clock.advance(step)
                if not self.launcher[f"slow{number}"].over:
                    self.launcher[f"slow{number}"].say("x")
            self.assertEqual(self.error(building).status, 101)
            self.assertTrue(self.launcher[f"slow{number}"].killed)
            self.assertEqual(observer.traces[-1], f"@ build-failed {drv} - timeout")
            self.assertIn(text, observer.logs[-1])
        self.assertEqual(world.leftovers(), [])

    def test_output_is_no_silence(self) -> None:
        """B12: output each second never triggers a limit of two seconds of silence."""
        world = self.world
        building = world.build(world.derive("a"), max_silent_time=2)
        for _ in range(20):
            self.clock.advance(1)
            self.launcher["a"].say(".")
        self.launcher["a"].finish()
        self.successResultOf(building)


class SharingTests(Fake):
    """Several clients, one builder."""

    def test_two_clients(self) -> None:
        """B7: one builder; the late client gets all of the log and the same result."""
        world, first, second = self.world, Recorder(), Recorder()
        drv = world.derive("a")
        one = world.build(drv, observer=first)
        self.launcher["a"].say("early\n")
        two = world.build(drv, observer=second)
        self.launcher["a"].say("late\n")
        self.launcher["a"].finish()
        self.successResultOf(one)
        self.successResultOf(two)
        self.assertEqual(self.launcher.names, ["a"])
        self.assertEqual(first.traces, second.traces)
        self.assertTrue(second.events[1][1].startswith("@ build-started"))
        self.assertEqual(second.text, "early\nlate\n")

    def test_clients_leave(self) -> None:
        """B8: the build goes on until its last client leaves, and can then start again."""
        world = self.world
        drv = world.derive("a")
        one, two = world.build(drv), world.build(drv)
        one.cancel()
        self.failureResultOf(one, CancelledError)
        self.assertEqual(self.launcher.running, ["a"])
        two.cancel()
        self.failureResultOf(two, CancelledError)
        self.assertTrue(self.launcher["a"].killed)
        self.assertEqual(world.leftovers(), [])
        three = world.build(drv)
        self.launcher["a"].finish()
        self.successResultOf(three)
        self.assertEqual(self.launcher.names, ["a", "a"])

    def test_slots_of_the_second_client(self) -> None:
        """A build that waits for its client's slot starts in that of another client."""
        world = self.world
        a, b = world.derive("a"), world.derive("b")
        one = world.build(a, b, max_jobs=1)
        self.assertEqual(self.launcher.running, ["a"])
        two = world.build(b, max_jobs=1)
        self.assertEqual(self.launcher.running, ["a", "b"])
        self.launcher["a"].finish()
        self.launcher["b"].finish()
        self.successResultOf(one)
        self.successResultOf(two)
        self.assertEqual(self.launcher.names, ["a", "b"])

    def test_client_without_jobs_is_left(self) -> None:
        """B10: who can start nothing gets an error when those who could have left."""
        world = self.world
        a, b = world.derive("a"), world.derive("b")
        one = world.build(a, b, max_jobs=1)
        two = world.build(b, max_jobs=0)
        self.assertNoResult(two)
        one.cancel()
        self.failureResultOf(one, CancelledError)
        self.assertIn("--max-jobs", self.error(two).text)

    def test_same_output(self) -> None:
        """Two derivations with one fixed output: one is built, the other finds it valid."""
        world = self.world
        fixed = ("sha256", hashlib.sha256(b"x").hexdigest())
        one, two = (
            world.derive("a", fixed=fixed, environment={"contents": "x", "url": url})
            for url in ("one", "two")
        )
        self.assertNotEqual(one, two)
        observer = Recorder()
        building = world.build(one, two, max_jobs=2, observer=observer)
        self.assertEqual(self.launcher.names, ["a"])
        self.launcher["a"].finish()
        self.successResultOf(building)
        self.assertEqual(self.launcher.names, ["a"])

    def test_slow_client(self) -> None:
        """A builder is held when all of its clients are far behind, and not for one alone."""
        world, slow, quick = self.world, Recorder(), Recorder()
        drv = world.derive("a")
        one = world.build(drv, observer=slow, max_silent_time=5)
        slow.blocked = Deferred()
        line = "x" * 65535 + "\n"
        for _ in range(5):
            self.launcher["a"].say(line)
        self.assertTrue(self.launcher["a"].paused)
        self.clock.advance(20)
        self.assertNoResult(one)
        two = world.build(drv, observer=quick)
        self.assertFalse(self.launcher["a"].paused)
        for _ in range(60):
            self.launcher["a"].say(line)
        self.launcher["a"].finish()
        self.successResultOf(two)
        self.assertNoResult(one)
        blocked, slow.blocked = slow.blocked, None
        blocked.callback(None)
        self.successResultOf(one)
        self.assertEqual(slow.text, line * 65)
        self.assertEqual(slow.text, quick.text)
        self.assertEqual(slow.traces, quick.traces)

    def test_stop(self) -> None:
        """All builds end with the engine."""
        world = self.world
        building = world.build(world.derive("a"), world.derive("b"), max_jobs=2)
        self.successResultOf(world.engine.stop())
        self.failureResultOf(building, CancelledError)
        self.assertEqual(self.launcher.running, [])
        self.assertEqual(world.leftovers(), [])


class GraphTests(Fake):
    """Whatever the graph."""

    def test_random_graphs(self) -> None:
        """B3, B9, B32: inputs before users, each once, none above a failed one."""
        numbers = iter(range(10**9))

        @settings(deadline=None, max_examples=25)
        @given(
            st.lists(st.sets(st.integers(0, 9), max_size=3), min_size=1, max_size=10),
            st.sets(st.integers(0, 9), max_size=2),
            st.integers(1, 3),
            st.booleans(),
        )
        def check(edges: list[set[int]], bad: set[int], jobs: int, keep_going: bool) -> None:
            number = next(numbers)
            world, launcher = self.world, FakeLauncher()
            names = [f"n{number}-{index}" for index in range(len(edges))]
            launcher.auto = {names[i]: 1 for i in bad if i < len(names)}
            self.launcher.started = launcher.started
            self.launcher.auto = launcher.auto
            drvs = []
            inputs = [
                {i % (index or 1) for i in e} if index else set() for index, e in enumerate(edges)
            ]
            for name, used in zip(names, inputs, strict=True):
                drvs.append(world.derive(name, inputs=[drvs[i] for i in sorted(used)]))
            building = world.build(*drvs, max_jobs=jobs, keep_going=keep_going)
            blocked = set()
            for index in range(len(drvs)):
                if index in bad or inputs[index] & blocked:
                    blocked.add(index)
            started = [names.index(name) for name in launcher.names]
            self.assertEqual(len(started), len(set(started)))
            for position, index in enumerate(started):
                self.assertLessEqual(inputs[index], set(started[:position]))
                self.assertFalse(inputs[index] & blocked)
            if not blocked:
                self.successResultOf(building)
            else:
                text = self.error(building).text
                if keep_going:
                    self.assertEqual({i for i, d in enumerate(drvs) if d in text}, blocked)
            if keep_going or not blocked:
                good = set(range(len(drvs))) - blocked
                self.assertEqual({i for i, d in enumerate(drvs) if world.is_valid(d)}, good)

        check()
