"""Derivations in memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadDerivation, StoreError
from guixd.formats.derivation import Output
from guixd.formats.path import StoreDirectory, StorePath
from guixd.store import derivations
from guixd.store.derivations import SMALL, Derivations, Sparingly, TooMany
from tests.support import temporary_directory


class DerivationsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.store = StoreDirectory(temporary_directory(self))
        self.all = Derivations(self.store)

    def write(self, number: int, size: int = 0) -> StorePath:
        """Make a derivation whose text has SIZE bytes and a little more."""
        path = self.store.child(f"{number:032}-x.drv")
        text = f'Derive([],[],[],"s","/b",["{"x" * size}"],[("name","x")])'
        Path(path).write_text(text)
        return path

    def test_read(self) -> None:
        """S34: what was read is in memory until it is not valid any more."""
        path = self.write(1)
        self.assertIsNone(self.all.known(path))
        drv = self.all.read(path)
        self.assertIs(self.all.read(path), drv)
        self.all.forget(path)
        self.all.forget(path)
        self.assertIsNone(self.all.known(path))
        os.unlink(path)
        self.assertRaises(StoreError, self.all.read, path)
        Path(path).write_text("nonsense")
        self.assertRaises(BadDerivation, self.all.read, path)

    def test_memory(self) -> None:
        """S34: neither many nor large derivations fill the memory."""
        size = derivations._LARGEST // 2
        paths = [self.write(n, size) for n in range(derivations._MOST_TEXT // size + 3)]
        for path in paths:
            self.all.read(path)
            kept = sum(self.all.known(p) is not None for p in paths)
            self.assertLessEqual(kept * size, derivations._MOST_TEXT)
            self.assertGreater(kept, 0)
        self.assertIsNone(self.all.known(paths[0]))  # the oldest go first
        self.assertIsNotNone(self.all.known(paths[-1]))
        large = self.write(99, 2 * size)
        self.all.read(large)
        self.assertIsNone(self.all.known(large))

    def test_outputs(self) -> None:
        """S34: outputs are remembered of more derivations, if there are few of them."""
        self.patch(derivations, "_MOST_MAPPINGS", 2)
        self.patch(derivations, "_MOST_OUTPUTS", 2)
        paths = [self.write(n) for n in range(3)]
        plain, some = self.all.read(paths[0]), Output(paths[0])
        self.all.forget(paths[0])
        for path, names in zip(paths, (("out",), ("doc", "out"), ("a", "b", "c")), strict=True):
            self.all.remember(path, replace(plain, outputs=dict.fromkeys(names, some)), 10**9)
            self.assertIsNone(self.all.known(path))
        self.assertEqual(self.all.outputs(paths[0]), {"out": paths[0]})
        self.assertEqual(self.all.outputs(paths[1]), {"doc": paths[0], "out": paths[0]})
        self.assertIsNone(self.all.outputs(paths[2]))
        self.all.read(paths[2])
        self.assertIsNone(self.all.outputs(paths[0]))
        self.assertEqual(self.all.outputs(paths[2]), {})
        self.all.forget(paths[2])
        self.assertIsNone(self.all.outputs(paths[2]))

    def test_sparingly(self) -> None:
        """S34: the reactor reads no large derivation, and not many; those known are welcome."""
        small, large = self.write(1), self.write(2, SMALL)
        self.assertFalse(self.all.takes_long(small))
        self.assertTrue(self.all.takes_long(large))
        self.assertFalse(self.all.takes_long(self.store.child("9" * 32 + "-none.drv")))
        some = Sparingly(self.all.read, self.all)
        some(small)
        self.assertRaises(TooMany, some, large)
        self.all.read(large)
        some(large)
        self.assertFalse(self.all.takes_long(large))
        paths = [self.write(n) for n in range(3, 40)]
        with self.assertRaises(TooMany):
            for path in paths:
                some(path)
        for path in paths:
            self.all.read(path)
        some = Sparingly(self.all.read, self.all)
        for path in paths:
            some(path)
