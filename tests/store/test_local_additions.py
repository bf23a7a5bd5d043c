"""Adding archives to the store of this machine."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from pathlib import Path

from guixd.errors import (
    BadDerivation,
    BadHash,
    BadName,
    Busy,
)
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from guixd.store.local import INLINE_TEXT
from tests.store.test_local import Case


class AdditionTests(Case):
    """Op 7."""

    def add_nar(
        self, name: str, nar: bytes, algorithm: str = "sha256", recursive: bool = True
    ) -> StorePath:
        addition = self.store.begin_addition(name, algorithm, recursive)
        self.assertEqual(addition.feed(nar), len(nar))
        return self.store.commit_addition(addition, self.roots)

    def test_add(self) -> None:
        """S4: recursive and flat; the staging place is used again and nothing is left."""
        nar = nar_of_file(b"Hello, store!\n")
        digest = hashlib.sha256(nar).digest()
        path = self.add_nar("hello.txt", nar)
        self.assertEqual(path, self.store.directory.source_path("hello.txt", digest))
        self.assert_item(path, b"Hello, store!\n")
        flat = self.add_nar("hello.txt", nar, "md5", False)
        self.assertEqual(
            flat,
            self.store.directory.fixed_path(
                "hello.txt", "md5", False, hashlib.md5(b"Hello, store!\n").digest()
            ),
        )
        self.assert_item(flat, b"Hello, store!\n")
        self.assertEqual(self.add_nar("hello.txt", nar), path)
        self.assertEqual(self.leftovers(), [])
        self.assertEqual(self.roots.paths, {path, flat})
        self.assertEqual(len(self.store.protected(but=self.roots)), 1)

    def test_leftover_is_replaced(self) -> None:
        """S5: a tree at the place of the item gives way."""
        nar = nar_of_file(b"1")
        path = self.store.directory.source_path("x", hashlib.sha256(nar).digest())
        os.makedirs(path + "/sub")
        self.assertEqual(self.add_nar("x", nar), path)
        self.assert_item(path, b"1")
        self.assertEqual(len(self.leftovers()), 1)

    def test_busy(self) -> None:
        """S14: it can be tried again when another process was in the way."""
        addition = self.store.begin_addition("x", "sha256", True)
        addition.feed(nar_of_file(b"1"))
        other = sqlite3.connect(self.directories.database + "/db.sqlite", isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN IMMEDIATE")
        self.assertRaises(Busy, self.store.commit_addition, addition, self.roots)
        self.assertTrue(self.store.is_left(addition))
        other.execute("ROLLBACK")
        path = self.store.commit_addition(addition, self.roots)
        self.assert_item(path, b"1")
        self.assertFalse(self.store.is_left(addition))
        self.assertEqual(self.leftovers(), [])

    def test_discard(self) -> None:
        """S4: what was given up is gone, and its place is used again."""
        addition = self.store.begin_addition("x", "sha256", True)
        addition.feed(nar_of_file(b"1" * 100)[:150])
        self.assertEqual(len(self.leftovers()), 1)
        self.store.discard_addition(addition)
        self.store.discard_addition(addition)
        self.assertEqual(self.leftovers(), [])
        again = self.store.begin_addition("x", "sha256", True)
        self.assertEqual(again.staging, addition.staging)
        other = self.store.begin_addition("x", "sha256", True)
        self.assertNotEqual(other.staging, again.staging)

    def test_large_duplicate(self) -> None:
        """S14: a large tree that is there already waits for a thread to remove it."""
        nar = nar_of_file(b"1" * INLINE_TEXT)
        path = self.add_nar("x", nar)
        addition = self.store.begin_addition("x", "sha256", True)
        addition.feed(nar)
        self.assertEqual(self.store.commit_addition(addition, self.roots), path)
        self.assertTrue(self.store.is_left(addition))
        self.store.discard_addition(addition)
        self.assertEqual(self.leftovers(), [])

    def test_errors(self) -> None:
        """S3: what went wrong in receiving is told at the end."""
        self.assertRaises(BadName, self.add_nar, "a b", nar_of_file(b""))
        self.assertRaises(BadHash, self.add_nar, "a", nar_of_file(b""), "sha257")

    def test_derivation(self) -> None:
        """D2: an item called a derivation must be one here, too."""
        text = self.derivation("a")
        path = self.add_nar("a.drv", nar_of_file(text))
        self.assertEqual(list(self.store.database.derivation_outputs(path)), ["out"])
        self.assertRaises(BadDerivation, self.add_nar, "b.drv", nar_of_file(b"x"))
        link = nar_of_file(b"").replace(nar_of_file(b"")[24:], b"")
        self.assertNotEqual(link, b"")

    def test_dead_process(self) -> None:
        """S16: what a process with our number left behind is not used."""
        first = self.store.begin_addition("x", "sha256", True)
        stem, _, number = first.staging.rpartition("-")
        Path(f"{stem}-{int(number) + 1}").write_text("left")
        second = self.store.begin_addition("x", "sha256", True)
        self.assertFalse(os.path.lexists(second.staging))
