"""Long work on trees that is given up in the middle."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from guixd.store.finding import find_reference
from guixd.store.rewriting import rewrite
from guixd.store.trees import (
    canonicalise,
    copy_fresh,
    hash_and_scan,
    hash_file,
    hash_nar,
    remove,
    strip,
)
from tests.support import DirectoryTestCase


class _GivenUp(Exception):
    pass


class GivenUpTests(DirectoryTestCase):
    def check_stops(self, work: Callable[..., object]) -> None:
        """WORK must ask at least five times whether to go on, and end when it shall not."""
        left = 4

        def check() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise _GivenUp

        self.assertRaises(_GivenUp, work, check=check)
        self.assertEqual(left, -1)

    def test_large_file(self) -> None:
        """X34: what reads or copies a file asks after each block."""
        Path(self.at("f")).touch()
        os.truncate(self.at("f"), 1 << 30)
        part = "0" * 32
        for work in (
            partial(hash_and_scan, self.fd, "f"),
            partial(hash_nar, self.fd, "f", hashlib.sha256()),
            partial(hash_file, self.fd, "f", hashlib.sha256()),
            partial(find_reference, self.fd, "f", part),
            partial(rewrite, self.fd, "f", "rewritten", {part: "1" * 32}),
            partial(copy_fresh, self.fd, "f", self.fd, "copy"),
        ):
            self.check_stops(work)

    def test_many_files(self) -> None:
        """X34: what goes through a tree asks at each node."""
        os.mkdir(self.at("t"))
        for number in range(9):
            os.mkfifo(self.at(f"t/{number}"))
        self.check_stops(partial(strip, self.fd, "t"))
        self.check_stops(partial(remove, self.fd, "t"))
        self.assertGreater(len(os.listdir(self.at("t"))), 3)
        remove(self.fd, "t")
        os.makedirs(self.at("t/a/b/c/d/e/f/g"))
        self.check_stops(partial(canonicalise, self.fd, "t", None, set()))
