"""Names of store items."""

from __future__ import annotations

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadName, NotInStore
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StoreDirectory, StorePath

STORE = StoreDirectory("/gnu/store")
TEXT = b"Hello, store!\n"


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class VectorTests(SynchronousTestCase):
    """S1: known names."""

    def test_text(self) -> None:
        """S1, S2: texts without, with one and with two references, in any order."""
        first = STORE.text_path("hello.txt", sha256(TEXT), [])
        self.assertEqual(first, "/gnu/store/bjfjcd0iwaqp6ckwlrd6qim7hjaa5ngi-hello.txt")
        second = STORE.text_path("ref.txt", sha256(first.encode() + b"\n"), [first])
        self.assertEqual(second, "/gnu/store/66dnfjqr9wl65f0am5rzgyw3k38zjnvw-ref.txt")
        for references in [first, second], [second, first], {first, second}:
            self.assertEqual(
                STORE.text_path("two.txt", sha256(b"two\n"), references),
                "/gnu/store/z1ly7dhrnx7d2lgcvqbng1pmf11awl6h-two.txt",
            )

    def test_fixed(self) -> None:
        """S1: contents of each kind and algorithm."""
        nar = nar_of_file(TEXT)
        self.assertEqual(len(nar), 128)
        cases = [
            ("sha256", True, "84larwrm54x7v7ysqg0xpax8vpiq2df5"),
            ("sha256", False, "z4xr586v1qir3vqqczbng6nanghf79qj"),
            ("md5", False, "dsvsw9mqyxx0z65jjmykdz2ky5ml465c"),
            ("md5", True, "c0yb2a1vsn5j87pq5s4rzkiynv8a06ad"),
            ("sha1", False, "ilh7mgr7z0lgd70d3034rb6awr1bxbxd"),
            ("sha1", True, "s6iadq6xbd75ny0d6c3b8kfwyd5zyfhy"),
            ("sha512", False, "2044znbcw6fhvddhjp7zl42gzidcrv3m"),
            ("sha512", True, "0wh09rf0i60zgk683z0qzaiz3b27jm8m"),
            ("sha3-256", False, "gj3x6f4d3cnxc85m3s0jragfhp5xy9yx"),
            ("sha3-512", False, "mfw7fnh2mf13ac6bvs3ymdyfms4nm3v1"),
            ("blake2s-256", False, "ynmzn89x61ni4x0ab89cfhirjmfsg5vc"),
        ]
        from guixd.formats import hashes

        for algorithm, recursive, part in cases:
            running = hashes.new(algorithm)
            running.update(nar if recursive else TEXT)
            path = STORE.fixed_path("hello.txt", algorithm, recursive, running.digest())
            self.assertEqual(path, f"/gnu/store/{part}-hello.txt")
        self.assertEqual(
            STORE.source_path("hello.txt", sha256(nar)).hash_part,
            "84larwrm54x7v7ysqg0xpax8vpiq2df5",
        )

    def test_outputs(self) -> None:
        """S1: the default output has the name of the derivation, others their own."""
        digest = bytes.fromhex("412787684b1064477d3e6cca19be104ae4580db2deb9cb2d6c7e76538108a419")
        self.assertEqual(
            STORE.output_path("lib", digest, "dep"),
            "/gnu/store/zhsx5608fp8nl6gb5cmbhdrxnwyf8ldb-dep-lib",
        )
        self.assertEqual(
            STORE.output_path("out", digest, "dep"),
            "/gnu/store/0bkxvy1hyxhx2170k82amxy7ffzpd8ch-dep",
        )

    def test_store_counts(self) -> None:
        """S1: in another store directory everything has other names."""
        other = StoreDirectory("/tmp/store").text_path("hello.txt", sha256(TEXT), [])
        self.assertTrue(other.startswith("/tmp/store/"))
        self.assertNotEqual(other.hash_part, "bjfjcd0iwaqp6ckwlrd6qim7hjaa5ngi")


class NameTests(SynchronousTestCase):
    """S3: what a name may be."""

    def test_allowed(self) -> None:
        """S3: all characters that are allowed, the empty name, long names."""
        for name in "", "x" * 217, "ABCZabcz0189+-._?=", "-", "a.":
            self.assertEqual(STORE.source_path(name, sha256(b"")).name, name)

    def test_refused(self) -> None:
        """S3: slash, blank, beyond ASCII, a dot in front, line ends."""
        for name in "a/b", "a b", "é", ".a", ".", "a\n", "\n", "a\0", "a*", "a!b", "\u0661":
            self.assertRaises(BadName, STORE.source_path, name, sha256(b""))


class ParseTests(SynchronousTestCase):
    """P7: the test that paths of clients must pass."""

    def test_parts(self) -> None:
        """P7: the parts of a name."""
        path = STORE.parse(b"/gnu/store/bjfjcd0iwaqp6ckwlrd6qim7hjaa5ngi-hello.drv")
        self.assertIsInstance(path, StorePath)
        self.assertEqual(path.hash_part, "bjfjcd0iwaqp6ckwlrd6qim7hjaa5ngi")
        self.assertEqual(path.name, "hello.drv")
        self.assertEqual(path.base, "bjfjcd0iwaqp6ckwlrd6qim7hjaa5ngi-hello.drv")
        self.assertTrue(path.is_derivation)
        self.assertEqual(STORE.child(path.base), path)

    def test_accepted(self) -> None:
        """P7: only the form counts."""
        for text in "/gnu/store/nope", "/gnu/store/.x", "/gnu/store/a b", "/gnu/store/..":
            self.assertEqual(STORE.parse(text), text)

    def test_refused(self) -> None:
        """P7: the store itself, what is below an item, what is elsewhere."""
        for text in (
            "",
            "/",
            "/gnu/store",
            "/gnu/store/",
            "/gnu/store/a/b",
            "/gnu/store/a/",
            "gnu/store/a",
            "/gnu/storex/a",
            "/tmp/a",
            "//gnu/store/a",
        ):
            error = self.assertRaises(NotInStore, STORE.parse, text)
            self.assertIn("is not in the store", error.text)
        self.assertRaises(NotInStore, STORE.child, "")
        self.assertRaises(NotInStore, STORE.child, "a/b")

    def test_containing(self) -> None:
        """P7: the item that something lies in."""
        self.assertEqual(STORE.containing("/gnu/store/a/b/c"), "/gnu/store/a")
        self.assertEqual(STORE.containing("/gnu/store/a"), "/gnu/store/a")
        for text in "/gnu/store", "/gnu/store/", "/tmp/gnu/store/a", "/gnu/store//a":
            self.assertRaises(NotInStore, STORE.containing, text)

    @settings(deadline=None)
    @given(st.binary(max_size=40).filter(lambda raw: raw and b"/" not in raw))
    def test_any_bytes(self, raw: bytes) -> None:
        """P7: names are bytes, and come back as they were."""
        path = STORE.parse(b"/gnu/store/" + raw)
        self.assertEqual(path.encode("utf-8", "surrogateescape"), b"/gnu/store/" + raw)
