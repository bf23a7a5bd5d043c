"""Finding hash parts in streams."""

from __future__ import annotations

import gzip
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.formats.hashes import BASE32_ALPHABET
from guixd.formats.references import Scanner

PART = "abcdfghijklmnpqrsvwxyz0123456789"
parts = st.text(BASE32_ALPHABET, min_size=32, max_size=32)
noise = st.one_of(
    st.binary(max_size=70),
    st.text("abc012e /", max_size=70).map(str.encode),
    st.text(BASE32_ALPHABET, max_size=70).map(str.encode),
)


def scan(wanted: list[str], data: bytes, step: int) -> set[str]:
    scanner = Scanner(wanted)
    for at in range(0, len(data), step):
        scanner.update(memoryview(data)[at : at + step])
    return scanner.found


class ScannerTests(SynchronousTestCase):
    def test_all_splits(self) -> None:
        """B24: a hash part is found however the stream is cut, once or many times."""
        data = b"!" * 10 + PART.encode() + b"-name"
        for step in range(1, len(data) + 1):
            self.assertEqual(scan([PART], data, step), {PART})
        for first in range(len(data) + 1):
            for second in range(first, len(data) + 1, 7):
                scanner = Scanner([PART])
                for block in (data[:first], data[first:second], b"", data[second:]):
                    scanner.update(block)
                self.assertEqual(scanner.found, {PART})

    def test_at_every_offset(self) -> None:
        """B24: the place in a block and what surrounds the hash part do not matter."""
        for around in (b"e", b"a", b"\0", b"0"):
            for offset in range(70):
                data = around * offset + PART.encode() + around * (offset % 5)
                self.assertEqual(scan([PART], data, 4096), {PART})

    def test_near_misses(self) -> None:
        """B24: 31 characters, upper case, UTF-16 and compressed text are not found."""
        for data in (
            PART.encode()[:31] + b"e",
            PART.encode()[1:],
            PART.upper().encode(),
            PART.encode("utf-16"),
            gzip.compress(PART.encode() + bytes(range(256))),
            PART[:16].encode() + b"\n" + PART[16:].encode(),
        ):
            for step in (1, 16, 4096):
                self.assertEqual(scan([PART], data, step), set())

    @settings(deadline=None, max_examples=100)
    @given(st.lists(st.one_of(parts, noise), max_size=8), st.lists(parts), st.integers(1, 99))
    def test_same_as_plain_search(
        self, pieces: list[str | bytes], others: list[str], step: int
    ) -> None:
        """B24: the answer is that of a search for each hash part in the whole stream."""
        data = b"".join(p.encode() if isinstance(p, str) else p for p in pieces)
        wanted = [p for p in pieces if isinstance(p, str)] + others
        if wanted:
            wanted.append(wanted[0][16:] + wanted[-1][:16])
        expected = {part for part in wanted if part.encode() in data}
        self.assertEqual(scan(wanted, data, step), expected)

    def test_thousands_in_long_runs(self) -> None:
        """B24: thousands of candidates, in text that consists of their alphabet only."""
        chance = random.Random(7)
        wanted = ["".join(chance.choices(BASE32_ALPHABET, k=32)) for _ in range(3000)]
        run = "".join(chance.choices(BASE32_ALPHABET, k=20_000))
        data = (run + wanted[5] + run[:333] + wanted[2999] + wanted[7]).encode()
        for step in (1000, 65536):
            self.assertEqual(scan(wanted, data, step), {wanted[5], wanted[2999], wanted[7]})

    def test_nothing_wanted(self) -> None:
        """B24: no candidates, no work, no find."""
        self.assertEqual(scan([], PART.encode(), 5), set())
