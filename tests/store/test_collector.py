"""One collection, step by step, and what is used in the middle of it (spec: gc §2)."""

from __future__ import annotations

import os
from collections.abc import Iterable

from guixd.formats.path import StorePath
from guixd.store.collector import Collection, Rules
from guixd.store.items import Registration
from guixd.store.trees import remove_path
from tests.store.test_local import Case

SECONDS = 60.0
"""Longer than any sweep of a test takes."""


class CollectorCase(Case):
    def begin(self, rules: Rules) -> Collection:
        """Begin to delete all that is dead; nothing that `add` added is protected."""
        self.lines: list[str] = []
        self.store.collecting.begin()
        collection = Collection(self.store, self.roots, rules, self.lines.append)
        self.addCleanup(collection.close)
        collection.mark(strict=True)
        collection.choose_all()
        collection.open_trash()
        return collection

    def texts(self, names: Iterable[str], size: int) -> list[StorePath]:
        return [self.add(name, b"x" * size) for name in names]

    def valid(self) -> set[StorePath]:
        return set(self.store.database.all_valid_paths())


class LimitTests(CollectorCase):
    def sweep(self, limit: int, sizes: Iterable[int]) -> Collection:
        for number, size in enumerate(sizes):
            self.add(f"t{number}", bytes(size))
        collection = self.begin(Rules(max_freed=limit))
        self.assertFalse(collection.sweep(SECONDS))
        return collection

    def test_exactly_reached(self) -> None:
        """G13: it ends when more has been freed than was asked for, not before."""
        collection = self.sweep(4000, [1000] * 8)
        self.assertEqual((len(collection.found), collection.freed), (5, 5000))
        self.assertTrue(collection.is_full())
        self.assertEqual(self.lines[-1], "deleted more than 4000 bytes; stopping")
        self.assertEqual(self.lines[3], f"[75%] deleting '{self.deleted(3)}'")
        self.assertEqual(len(self.valid()), 3)

    def test_small_files(self) -> None:
        """G13: items are larger as archives than as files, which must not end it too early."""
        collection = self.sweep(150, [10] * 60)
        self.assertEqual((len(collection.found), collection.freed), (16, 160))
        self.assertEqual(len(self.valid()), 44)

    def test_more_than_there_is(self) -> None:
        """G13: a limit that is not reached is no end."""
        collection = self.sweep(100_000, [1000] * 50)
        self.assertEqual((len(collection.found), collection.freed), (50, 50_000))
        self.assertFalse(collection.is_full())

    def test_what_waits_in_the_trash(self) -> None:
        """G13: large files count before the trash is emptied."""
        collection = self.sweep(41 * 70_000, [70_000] * 60)
        self.assertEqual((len(collection.found), collection.freed), (42, 0))
        self.assertEqual(collection.empty(collection.take_moved()), 42 * 70_000)

    def deleted(self, number: int) -> str:
        return self.lines[number].split("'")[1]


class LeftoverTests(CollectorCase):
    def test_gone(self) -> None:
        """B39: a failed output that a build removes at that moment is no trouble."""
        for name, make in ("directory", os.mkdir), ("file", os.mknod):
            leftover = self.store.directory.child(f"{'0' * 32}-{name}")
            make(leftover)
            collection = self.begin(Rules())

            def report(line: str, path: str = leftover) -> None:
                self.lines.append(line)
                remove_path(path)

            self.patch(collection, "_report", report)
            self.assertFalse(collection.sweep(SECONDS))
            self.assertEqual([line.split()[-1] for line in self.lines], [f"'{leftover}'"])
            collection.close()


class TouchedTests(CollectorCase):
    """G19: an item that is dead when a collection begins, and used before it is deleted."""

    def setUp(self) -> None:
        super().setUp()
        self.drv = self.add("p.drv", self.derivation("p"))
        (self.out,) = self.store.derivation_outputs(self.drv).values()
        self.other = self.add("other")
        staging = self.store.staging.take()
        with open(staging, "wb"):  # noqa: PTH123
            pass
        item = Registration(self.out, bytes(32), 1, frozenset(), self.drv)
        self.store.place(staging, item)

    def sweep_using(self, rules: Rules, path: StorePath) -> set[StorePath]:
        """Return what is left when PATH is used by a session after it was found dead."""
        collection = self.begin(rules)
        session = self.store.temp_roots()
        self.addCleanup(session.close)
        session.add(path)
        self.assertFalse(collection.sweep(SECONDS))
        return self.valid()

    def test_itself(self) -> None:
        """Only the item, as nothing more is to be kept."""
        left = self.sweep_using(Rules(keep_derivations=False), self.out)
        self.assertEqual(left, {self.out})

    def test_derivation_too(self) -> None:
        """Its derivation, too, where derivations of live outputs are kept."""
        self.assertEqual(self.sweep_using(Rules(), self.out), {self.out, self.drv})

    def test_outputs_too(self) -> None:
        """Its outputs, too, where outputs of live derivations are kept."""
        left = self.sweep_using(Rules(keep_outputs=True, keep_derivations=False), self.drv)
        self.assertEqual(left, {self.out, self.drv})
        self.assertNotIn(self.other, left)

    def test_outputs_of_nothing(self) -> None:
        """A used item that is no derivation has no outputs to keep."""
        left = self.sweep_using(Rules(keep_outputs=True), self.other)
        self.assertEqual(left, {self.other})

    def test_gone_already(self) -> None:
        """What another has made invalid meanwhile is none of it."""
        collection = self.begin(Rules(keep_outputs=True))
        session = self.store.temp_roots()
        self.addCleanup(session.close)
        session.add(self.drv)
        self.store.invalidate(self.drv)
        self.assertFalse(collection.sweep(SECONDS))
        self.assertEqual(self.valid(), set())
