"""Hashes and nix-base32."""

from __future__ import annotations

import hashlib
from operator import xor

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadHash
from guixd.formats import hashes


class Base32Tests(SynchronousTestCase):
    """S1: the notation of hash parts."""

    vectors = [
        (bytes(range(20)), "2c91240g1q6hq2qa1440f1h50h1h4080"),
        (bytes(range(32)), "07qy3lf1n6hr30bic58l2c91240g1q6hq2qa1440f1h50h1h4080"),
        (hashlib.sha256(b"").digest(), "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"),
        (
            hashlib.sha256(b"hello\n").digest(),
            "00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq",
        ),
        (hashlib.md5(b"").digest(), "3y8bwfr609h3lh9ch0izcqq7fl"),
        (hashlib.sha1(b"/home/u/result").digest(), "jlknlzmcc8vgpkzq233mzp2rfy9pnn48"),
        (b"", ""),
    ]

    def test_vectors(self) -> None:
        """S1: known values, both ways."""
        for digest, text in self.vectors:
            self.assertEqual(hashes.to_base32(digest), text)
            self.assertEqual(hashes.from_base32(text, len(digest)), digest)

    def test_lengths(self) -> None:
        """S1: how long the notation of each digest is."""
        lengths = {
            name: len(hashes.to_base32(hashes.new(name).digest())) for name in hashes.ALGORITHMS
        }
        self.assertEqual(
            lengths,
            {
                "md5": 26,
                "sha1": 32,
                "sha256": 52,
                "sha512": 103,
                "sha3-256": 52,
                "sha3-512": 103,
                "blake2s-256": 52,
            },
        )

    @settings(deadline=None)
    @given(st.binary(max_size=70))
    def test_any(self, digest: bytes) -> None:
        """S1: what is written is read again."""
        self.assertEqual(hashes.from_base32(hashes.to_base32(digest), len(digest)), digest)

    @settings(deadline=None)
    @given(st.binary(min_size=21, max_size=40))
    def test_folded(self, digest: bytes) -> None:
        """S2: bytes beyond the twentieth are combined with the first."""
        folded = bytes(map(xor, digest[:20], digest[20:].ljust(20, b"\0")))
        self.assertEqual(hashes.folded_base32(digest), hashes.to_base32(folded))

    def test_fold(self) -> None:
        """S1: an example that is known elsewhere."""
        digest = bytes.fromhex("1390801431658172f5326fa473b1e21134269d5ce2492280b5c2c71eaf941396")
        folded = bytes.fromhex("f1d9a29484a7466c5aa67c3273b1e21134269d5c")
        self.assertEqual(hashes.folded_base32(digest), hashes.to_base32(folded))

    def test_refused(self) -> None:
        """S1: wrong length, letters outside the alphabet, bits beyond the digest."""
        good = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"
        bad = [good[:-1], good + "0", "", good.upper(), "2" + good[1:], good[:-1] + "é"]
        bad += [good[:-1] + letter for letter in "eotu-/ "]
        for text in bad:
            self.assertRaises(BadHash, hashes.from_base32, text, 32)


class HexTests(SynchronousTestCase):
    """D3: digests in derivations."""

    def test_read(self) -> None:
        """D3: either letter case."""
        digest = hashlib.sha256(b"x").digest()
        self.assertEqual(hashes.from_hex(digest.hex(), "sha256"), digest)
        self.assertEqual(hashes.from_hex(digest.hex().upper(), "sha256"), digest)

    def test_refused(self) -> None:
        """D3: the error names the algorithm in upper case."""
        good = hashlib.sha256(b"x").hexdigest()
        for text in good[:-1], good[:-2], good + "00", "g" + good[1:], "  " + good[2:], "":
            error = self.assertRaises(BadHash, hashes.from_hex, text, "sha256")
            self.assertIn("invalid SHA256 hash", error.text)
        error = self.assertRaises(BadHash, hashes.from_hex, good, "sha-256")
        self.assertIn("unknown hash algorithm", error.text)


class AlgorithmTests(SynchronousTestCase):
    """Which algorithms there are."""

    def test_sizes(self) -> None:
        """S1: sizes of digests, and that each algorithm is the one meant."""
        self.assertEqual(
            {name: hashes.digest_size(name) for name in hashes.ALGORITHMS},
            {
                "md5": 16,
                "sha1": 20,
                "sha256": 32,
                "sha512": 64,
                "sha3-256": 32,
                "sha3-512": 64,
                "blake2s-256": 32,
            },
        )
        running = hashes.new("blake2s-256")
        running.update(b"abc")
        self.assertEqual(running.digest(), hashlib.blake2s(b"abc").digest())
        running = hashes.new("sha3-512")
        running.update(memoryview(b"abc"))
        self.assertEqual(running.digest(), hashlib.sha3_512(b"abc").digest())
        for name in "sha384", "SHA256", "", "r:sha256":
            self.assertRaises(BadHash, hashes.new, name)
            self.assertRaises(BadHash, hashes.digest_size, name)
