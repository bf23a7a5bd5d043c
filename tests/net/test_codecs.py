"""Undoing compressions: whole, in pieces, garbled, and bombs (U13; substitutes §10)."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
import zlib

from backports import zstd
from twisted.trial.unittest import SynchronousTestCase

from guixd.net.codecs import BLOCK, COMPRESSIONS, BadData, decoder, supported


def lzip(data: bytes, dictionary: int = 20) -> bytes:
    """Return DATA as one member of an lzip file."""
    lzma1 = {"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 2}
    body = lzma.compress(data, lzma.FORMAT_RAW, filters=[lzma1])
    tail = struct.pack("<IQQ", zlib.crc32(data), len(data), len(body) + 26)
    return b"LZIP\1" + bytes([dictionary]) + body + tail


COMPRESS = {
    "none": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzip": lzip,
    "zstd": zstd.compress,
}
PLAIN = b"abc" * 200_000 + os.urandom(300_000)


def undo(compression: str, data: bytes, step: int) -> bytes:
    codec = decoder(compression)
    blocks = []
    for begin in range(0, len(data), step):
        blocks += codec.feed(data[begin : begin + step])
    codec.end()
    return b"".join(blocks)


class CodecsTest(SynchronousTestCase):
    def test_all_are_undone(self) -> None:
        """U13"""
        self.assertEqual(supported(), COMPRESSIONS)
        for compression, compress in COMPRESS.items():
            data = compress(PLAIN)
            for step in (len(data), 10_007):
                self.assertEqual(undo(compression, data, step), PLAIN, compression)

    def test_byte_for_byte_and_empty(self) -> None:
        for compression, compress in COMPRESS.items():
            self.assertEqual(undo(compression, compress(b"some text"), 1), b"some text")
            if compression != "none":
                self.assertEqual(undo(compression, compress(b""), 5), b"")

    def test_several_members(self) -> None:
        for compression in ("gzip", "bzip2", "xz", "lzip", "zstd"):
            data = COMPRESS[compression](b"one ") + COMPRESS[compression](b"two")
            for step in (len(data), 3):
                self.assertEqual(undo(compression, data, step), b"one two", compression)

    def test_incomplete_and_garbled_data(self) -> None:
        """U10, U11"""
        for compression in ("gzip", "bzip2", "xz", "lzip", "zstd"):
            data = COMPRESS[compression](PLAIN[:1000])
            for wrong in (data[:-1], data[: len(data) // 2], b"", b"garbage" * 10, data + b"x"):
                with self.assertRaises(BadData, msg=f"{compression} {wrong[:8]!r}"):
                    undo(compression, wrong, 100)
        data = bytearray(lzip(PLAIN[:1000]))
        data[-20] ^= 1
        with self.assertRaises(BadData):
            undo("lzip", bytes(data), 100)

    def test_bombs_come_out_in_small_blocks(self) -> None:
        zeros = bytes(64 << 20)
        for compression in ("gzip", "bzip2", "xz", "lzip", "zstd"):
            codec = decoder(compression)
            first = next(iter(codec.feed(COMPRESS[compression](zeros))))
            self.assertLessEqual(len(first), BLOCK)

    def test_huge_dictionaries_are_refused(self) -> None:
        with self.assertRaises(BadData):
            undo("lzip", lzip(b"text", 0x1D), 100)

    def test_unknown_ones(self) -> None:
        """U13"""
        with self.assertRaises(BadData):
            decoder("rar")
