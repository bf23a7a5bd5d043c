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
from guixd.store.locks import PathLocks, is_locked
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
