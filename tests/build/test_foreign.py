"""Waiting for the locks of other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet import reactor as installed
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from guixd.build import foreign
from guixd.build.foreign import released
from guixd.store.items import Registration
from guixd.store.locks import PathLocks, is_locked
from tests.build.test_revisions import Case
from tests.store.holder import Holder
from tests.support import open_files, temporary_directory

reactor: Any = installed


class WatchTests(TestCase):
    """B35: the kernel tells when a lock is free."""

    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.files = [f"{self.directory}/{name}.lock" for name in "ab"]
        self.holder = Holder(self)
        for file in self.files:
            self.assertEqual(self.holder.ask("write", file), "yes")
        # No look at the files is to help.
        self.patch(foreign, "SLOW_LOOK", 10_000)

    async def test_death(self) -> None:
        """B35: the end of who holds several locks is noticed without looking."""
        waiting = released(reactor, self.files)
        self.assertTrue(all(map(is_locked, self.files)))
        self.holder.kill()
        await waiting

    async def test_removal(self) -> None:
        """B35: success removes lock files; all must be free, not the first one only."""
        waiting = released(reactor, self.files)
        self.holder.ask("stale", self.files[0])
        self.assertFalse(is_locked(self.files[0]))
        other = PathLocks.acquire([f"{self.directory}/a"])
        self.assertIsNotNone(other)
        self.assertFalse(waiting.called)
        self.holder.ask("stale", self.files[1])
        assert other is not None
        other.release(delete=False)
        await waiting

    async def test_new_file_of_the_name(self) -> None:
        """B35: a third one that was quicker is waited for, too, on its new file."""
        waiting = released(reactor, self.files[:1])
        third = Holder(self)
        self.holder.ask("stale", self.files[0])
        third.ask("write", self.files[0])
        third.kill()
        await waiting

    async def test_given_up(self) -> None:
        """B8: who gives up leaves no watch and no timer behind."""
        before = open_files()
        waiting = released(reactor, self.files)
        self.assertGreater(open_files(), before)
        waiting.cancel()
        try:
            await waiting
        except CancelledError:
            pass
        self.assertEqual(open_files(), before)
        self.assertEqual(reactor.getDelayedCalls(), [])


class LookTests(SynchronousTestCase):
    """Where the kernel cannot be asked."""

    def test_looks(self) -> None:
        """B35: without watches the files are looked at from time to time, new ones as well."""
        file = f"{temporary_directory(self)}/a.lock"
        holder, clock = Holder(self), Clock()
        holder.ask("write", file)
        waiting = released(clock, [file])
        clock.pump([foreign.LOOK] * 3)
        self.assertNoResult(waiting)
        third = Holder(self)
        holder.ask("stale", file)
        third.ask("write", file)
        clock.pump([foreign.LOOK] * 3)
        self.assertNoResult(waiting)
        third.ask("drop", file)
        clock.advance(foreign.LOOK)
        clock.advance(foreign.SETTLE)
        self.successResultOf(waiting)
        self.assertEqual(clock.getDelayedCalls(), [])

    def test_no_lock(self) -> None:
        """A file that nobody has locked, or that is not there, is not waited for."""
        directory, clock = temporary_directory(self), Clock()
        Path(directory, "a").touch()
        waiting = released(clock, [f"{directory}/a", f"{directory}/b"])
        clock.advance(foreign.SETTLE)
        self.successResultOf(waiting)


class BuildTests(Case):
    """B35: builds whose outputs another process has locked."""

    def setUp(self) -> None:
        super().setUp()
        self.drv, self.other = self.world.derive("drv"), self.world.derive("other")
        self.output = self.world.output(self.drv)
        self.holder = Holder(self)
        self.lock = self.output + ".lock"

    def look(self) -> None:
        for seconds in foreign.LOOK, foreign.SETTLE:
            self.clock.advance(seconds)

    def test_client_leaves(self) -> None:
        """B8: who leaves meanwhile leaves nothing behind; the next one waits and builds."""
        self.holder.ask("write", self.lock)
        building = self.request(self.drv)
        building.addErrback(lambda _: None)
        building.cancel()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        building = self.request(self.drv)
        self.look()
        self.assertEqual(self.launcher.names, [])
        self.holder.kill()
        self.look()
        self.launcher["drv"].finish()
        self.successResultOf(building)

    def test_made_meanwhile(self) -> None:
        """What the other process has made is not built."""
        self.holder.ask("write", self.lock)
        building = self.request(self.drv)
        Path(self.output).touch()
        self.world.store.register([Registration(self.output, bytes(32), 120)])
        self.holder.ask("stale", self.lock)
        self.look()
        self.successResultOf(building)
        self.assertEqual(self.launcher.names, [])

    def test_stop(self) -> None:
        """A daemon that stops waits for no lock of which nothing but a build could come."""
        self.holder.ask("write", self.lock)
        building = self.request(self.drv, self.other)
        self.world.engine.close()
        self.assertNoResult(building)
        self.launcher["other"].finish()
        self.assertIn("stopping", self.error(building).text)
        self.holder.kill()
        self.look()
        self.assertEqual(self.launcher.names, ["other"])

    def test_locked_while_it_waits_for_a_slot(self) -> None:
        """A build that has a slot, but then not the lock, lets others go on."""
        third = self.world.derive("third", inputs=[self.other])
        building = self.request(self.other, self.drv, third, max_jobs=1)
        self.assertEqual(self.launcher.running, ["other"])
        self.holder.ask("write", self.lock)
        self.launcher["other"].finish()
        self.assertEqual(self.launcher.running, ["third"])
        self.holder.kill()
        self.look()
        self.assertEqual(self.launcher.running, ["third"])
        self.launcher["third"].finish()
        self.launcher["drv"].finish()
        self.successResultOf(building)
        self.assertEqual(self.launcher.names, ["other", "third", "drv"])
