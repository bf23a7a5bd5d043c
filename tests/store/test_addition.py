"""Additions to the store: names, hashes and files in one pass."""

from __future__ import annotations

import hashlib
import os
import stat

from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadArchive, BadHash, BadName, StoreError
from guixd.formats.nar import CLOSE, MAGIC, file_header, nar_of_file
from guixd.formats.path import StoreDirectory
from guixd.store.addition import Addition
from guixd.store.trees import hash_and_scan
from tests.archives import VECTOR, File, Link, Tree, archive, read_tree
from tests.support import temporary_directory

HELLO = b"Hello, store!\n"
HELLO_HASH = "4ab03ed7a510387c0b93b322d17a4fa2dc4493a75e227174208a35c5e9c302dd"


class AdditionTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.staging = self.directory + "/staged"

    def start(self, name: str, algorithm: str = "sha256", recursive: bool = True) -> Addition:
        return Addition(StoreDirectory(), self.staging, name, algorithm, recursive)

    def add(self, data: bytes, name: str, algorithm: str, recursive: bool, step: int) -> Addition:
        """Feed DATA, followed by other bytes, in blocks of STEP bytes."""
        addition = self.start(name, algorithm, recursive)
        used = 0
        stream = data + b"next request"
        while not addition.complete:
            used += addition.feed(stream[used : used + step])
        self.assertEqual(used, len(data))
        return addition

    def test_names(self) -> None:
        """S1: the names of a file added in every way, and the hash of its archive."""
        for algorithm, recursive, base in (
            ("sha256", True, "84larwrm54x7v7ysqg0xpax8vpiq2df5"),
            ("sha256", False, "z4xr586v1qir3vqqczbng6nanghf79qj"),
            ("md5", True, "c0yb2a1vsn5j87pq5s4rzkiynv8a06ad"),
            ("md5", False, "dsvsw9mqyxx0z65jjmykdz2ky5ml465c"),
            ("sha1", True, "s6iadq6xbd75ny0d6c3b8kfwyd5zyfhy"),
            ("sha1", False, "ilh7mgr7z0lgd70d3034rb6awr1bxbxd"),
            ("sha512", True, "0wh09rf0i60zgk683z0qzaiz3b27jm8m"),
            ("sha512", False, "2044znbcw6fhvddhjp7zl42gzidcrv3m"),
            ("sha3-256", False, "gj3x6f4d3cnxc85m3s0jragfhp5xy9yx"),
            ("sha3-512", False, "mfw7fnh2mf13ac6bvs3ymdyfms4nm3v1"),
            ("blake2s-256", False, "ynmzn89x61ni4x0ab89cfhirjmfsg5vc"),
        ):
            for step in (1 << 16, 7):
                data = nar_of_file(HELLO)
                addition = self.add(data, "hello.txt", algorithm, recursive, step)
                self.assertEqual(addition.result(), f"/gnu/store/{base}-hello.txt")
                self.assertEqual(addition.path, addition.result())
                self.assertEqual(addition.nar_hash.hex(), HELLO_HASH)
                self.assertEqual(addition.nar_size, 128)
                self.assertEqual(read_tree(self.staging.encode()), File(HELLO))
                addition.discard()
                self.assertEqual(os.listdir(self.directory), [])

    def test_tree(self) -> None:
        """N1 S4: a tree gets its well-known name, and has the store's metadata at once."""
        addition = self.add(archive(VECTOR), "tree", "sha256", True, 11)
        self.assertEqual(addition.result(), "/gnu/store/h3a1khnv51q95x7bn5gilwlmd91w2nsi-tree")
        self.assertEqual(addition.nar_size, 696)
        self.assertEqual(read_tree(self.staging.encode()), VECTOR)
        status = os.lstat(self.staging)
        self.assertEqual(stat.S_IMODE(status.st_mode), 0o555)
        self.assertEqual(status.st_mtime_ns, 1_000_000_000)
        measured = hash_and_scan(None, self.staging)
        self.assertEqual((measured.digest, measured.size), (addition.nar_hash, 696))

    def test_flat_executable(self) -> None:
        """S4: a flat file loses its executable bit, on disk and in its hash."""
        for contents in (HELLO, b"", b"x" * 100_000):
            data = nar_of_file(contents, True)
            addition = self.add(data, "hello.txt", "sha256", False, 5000)
            plain = nar_of_file(contents)
            self.assertEqual(addition.nar_hash, hashlib.sha256(plain).digest())
            self.assertEqual(addition.nar_size, len(plain))
            self.assertEqual(stat.S_IMODE(os.lstat(self.staging).st_mode), 0o444)
            self.assertEqual(hash_and_scan(None, self.staging).digest, addition.nar_hash)
            addition.discard()

    def test_flat_but_no_file(self) -> None:
        """P14: a flat addition of anything else fails after all of it was read."""
        trees: tuple[Tree, ...] = (VECTOR, Link(b"x"), {}, {b"a": File(b"a")})
        for tree in trees:
            addition = self.add(archive(tree), "name", "sha256", False, 50)
            with self.assertRaises(StoreError) as caught:
                addition.result()
            self.assertIn("regular file expected", caught.exception.text)
            self.assertEqual(os.listdir(self.directory), [])
            addition.discard()

    def test_bad_names_and_algorithms(self) -> None:
        """S3: they are reported after the archive was read, and nothing is written."""
        for name, algorithm, error in (
            ("a/b", "sha256", BadName),
            (".hidden", "sha256", BadName),
            ("a b", "md5", BadName),
            ("\u00e9", "sha256", BadName),
            ("good", "sha257", BadHash),
        ):
            for recursive in (True, False):
                addition = self.add(archive(VECTOR), name, algorithm, recursive, 1 << 16)
                self.assertRaises(error, addition.result)
                self.assertEqual(os.listdir(self.directory), [])
        for name in ("", "n" * 217):
            addition = self.add(nar_of_file(HELLO), name, "sha256", True, 1 << 16)
            self.assertTrue(addition.result().endswith("-" + name))
            addition.discard()

    def test_bad_archive(self) -> None:
        """P15: a syntax error is raised at once, and the remains can be discarded."""
        self.assertRaises(BadArchive, self.start("x").feed, b"not an archive")
        data = bytearray(archive(VECTOR))
        data[-16] = 2
        addition = self.start("x")
        self.assertRaises(BadArchive, addition.feed, bytes(data))
        self.assertFalse(addition.complete)
        self.assertRaises(StoreError, addition.result)
        addition.discard()
        self.assertEqual(os.listdir(self.directory), [])

    def test_disk_errors(self) -> None:
        """P14: an error of the file system is reported after the archive was read."""
        os.mkdir(self.staging)
        addition = self.add(archive(VECTOR), "x", "sha256", True, 100)
        self.assertRaises(StoreError, addition.result)
        huge = self.start("x", recursive=False)
        os.rmdir(self.staging)
        huge.feed(MAGIC + file_header(1 << 60, True))
        self.assertFalse(huge.complete)
        huge.discard()
        self.assertEqual(os.listdir(self.directory), [])

    def test_derivation_text(self) -> None:
        """S34: the text of a derivation is at hand without reading it again."""
        text = b"Derive" + b"x" * 100_000
        for recursive in (True, False):
            addition = self.add(nar_of_file(text), "x.drv", "sha256", recursive, 9999)
            self.assertEqual(addition.derivation_text, text)
            addition.discard()
        for tree in (VECTOR, Link(b"x.drv"), {b"a.drv": File(text)}):
            addition = self.add(archive(tree), "x.drv", "sha256", True, 1 << 20)
            addition.result()
            self.assertIsNone(addition.derivation_text)
            addition.discard()
        addition = self.add(nar_of_file(text), "x.drvs", "sha256", True, 1 << 20)
        self.assertIsNone(addition.derivation_text)

    def test_large_file_in_views(self) -> None:
        """N10: a file in many blocks, given as views, is hashed and written in one pass."""
        block = os.urandom(1 << 20)
        expected = hashlib.sha256()
        addition = self.start("big", recursive=False)
        header = MAGIC + file_header(8 << 20)
        self.assertEqual(addition.feed(memoryview(header)), len(header))
        for _ in range(8):
            expected.update(block)
            self.assertEqual(addition.feed(memoryview(block)), len(block))
        self.assertEqual(addition.feed(CLOSE + b"rest"), len(CLOSE))
        self.assertEqual(
            addition.result(),
            StoreDirectory().fixed_path("big", "sha256", False, expected.digest()),
        )
        self.assertEqual(os.stat(self.staging).st_size, 8 << 20)
