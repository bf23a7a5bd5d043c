"""Equal files of the store as one inode."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import StoreError
from guixd.formats.hashes import to_base32
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StoreDirectory
from guixd.store import links
from guixd.store.addition import Addition
from guixd.store.links import SMALLEST, Links
from guixd.store.trees import canonicalise, hash_and_scan
from tests.archives import File, Tree, archive, read_tree, write_tree
from tests.support import is_root, temporary_directory

LARGE = b"large" * 2000


def key(contents: bytes, executable: bool = False) -> str:
    """Return the name that a file has in the pool."""
    return to_base32(hashlib.sha256(nar_of_file(contents, executable)).digest())


class LinksCase(SynchronousTestCase):
    """A store directory without a daemon."""

    def setUp(self) -> None:
        self.store = temporary_directory(self) + "/store"
        os.mkdir(self.store, 0o755)
        self.pool = self.store + "/.links"
        self.links = Links(self.store)
        self.addCleanup(self.links.close)

    def at(self, name: str) -> str:
        return f"{self.store}/{name}"

    def add(self, name: str, tree: Tree, pool: Links | None = None) -> str:
        """Receive TREE as an item and return its file name."""
        addition = Addition(
            StoreDirectory(), self.at(name), name, "sha256", True, links=pool or self.links
        )
        addition.feed(archive(tree))
        addition.result()
        return self.at(name)

    def build(self, name: str, tree: Tree) -> str:
        """Take TREE in as a builder left it, and return its file name."""
        path = self.at(name)
        write_tree(os.fsencode(path), tree)
        canonicalise(None, path, None, set())
        measured = hash_and_scan(None, path, (), self.links)
        self.assertEqual(measured.digest, hashlib.sha256(archive(tree)).digest())
        return path

    def entries(self) -> list[str]:
        return sorted(os.listdir(self.pool))

    def leftovers(self) -> list[str]:
        return [name for name in os.listdir(self.store) if name.startswith(".tmp-link")]

    def inode(self, path: str) -> int:
        return os.lstat(path).st_ino

    def assert_canonical(self, *paths: str) -> None:
        for path in paths:
            status = os.lstat(path)
            self.assertEqual(stat.S_IMODE(status.st_mode) & 0o222, 0, path)
            self.assertEqual(status.st_mtime_ns, 10**9, path)


class SharingTests(LinksCase):
    def test_sizes(self) -> None:
        """S17: from 8192 bytes on files share an inode, executable ones another one."""
        large, small = b"x" * SMALLEST, b"x" * (SMALLEST - 1)
        for take in self.add, self.build:
            first = take(
                f"first-{take.__name__}",
                {b"a": File(large), b"b": File(large, True), b"c": File(small)},
            )
            other = take(
                f"other-{take.__name__}",
                {b"a": File(large), b"b": File(large, True), b"c": File(small)},
            )
            for name in "ab":
                self.assertEqual(self.inode(f"{first}/{name}"), self.inode(f"{other}/{name}"))
            self.assertNotEqual(self.inode(first + "/a"), self.inode(first + "/b"))
            self.assertEqual(os.stat(first + "/c").st_nlink, 1)
            self.assertEqual(os.stat(other + "/c").st_nlink, 1)
        self.assertEqual(os.stat(first + "/a").st_nlink, 5)
        self.assertEqual(self.entries(), sorted([key(large), key(large, True)]))
        self.assertEqual((self.links.files, self.links.freed), (6, 6 * SMALLEST))
        self.assertEqual(self.leftovers(), [])

    def test_link_count(self) -> None:
        """S17: two equal files and the pool make three links; mode and time stay."""
        first = self.add("first", File(LARGE))
        other = self.add("other", File(LARGE))
        self.assertEqual(os.stat(first).st_nlink, 3)
        self.assertEqual(self.inode(first), self.inode(other))
        self.assertEqual(self.inode(first), self.inode(f"{self.pool}/{key(LARGE)}"))
        self.assert_canonical(first)

    def test_directories(self) -> None:
        """S18: directories in which files are replaced keep mode 0555 and time 1."""
        tree: Tree = {b"sub": {b"x": File(LARGE), b"y": File(LARGE)}, b"z": File(LARGE)}
        for path in (self.add("added", tree), self.build("built", tree)):
            self.assertEqual(os.stat(path + "/z").st_nlink, 7)
            self.assert_canonical(path, path + "/sub", path + "/sub/x")
            self.assertEqual(stat.S_IMODE(os.stat(path + "/sub").st_mode), 0o555)
            self.assertEqual(read_tree(os.fsencode(path)), tree)

    def test_hard_links(self) -> None:
        """S6: files that a builder has linked to each other stay so."""
        self.add("known", File(LARGE))
        path = self.at("built")
        os.mkdir(path)
        Path(path, "one").write_bytes(LARGE)
        os.link(path + "/one", path + "/two")
        canonicalise(None, path, None, set())
        hash_and_scan(None, path, (), self.links)
        self.assertEqual(self.inode(path + "/one"), self.inode(path + "/two"))
        self.assertEqual(os.stat(path + "/one").st_nlink, 4)

    def test_without(self) -> None:
        """O19: nothing is shared unless it is asked for."""
        addition = Addition(StoreDirectory(), self.at("x"), "x", "sha256", True)
        addition.feed(archive({b"a": File(LARGE), b"b": File(LARGE)}))
        self.assertFalse(os.path.exists(self.pool))


class PoolTests(LinksCase):
    """What may be wrong with the pool."""

    def test_wrong_size(self) -> None:
        """S19: an entry of another size is replaced, and the client is told."""
        os.mkdir(self.pool)
        Path(self.pool, key(LARGE)).write_bytes(b"other")
        path = self.add("x", File(LARGE))
        self.assertEqual(self.inode(path), self.inode(f"{self.pool}/{key(LARGE)}"))
        self.assertEqual(Path(path).read_bytes(), LARGE)
        (note,) = self.links.notes
        self.assertIn(key(LARGE), note)

    def test_wrong_kinds(self) -> None:
        """S19: neither links to elsewhere nor writable or foreign files take a file's place."""
        os.mkdir(self.pool)
        entry = Path(self.pool, key(LARGE))
        outside = Path(self.store, "..", "outside")
        outside.write_bytes(LARGE)

        def foreign() -> None:
            entry.write_bytes(LARGE)
            entry.chmod(0o444)
            os.chown(entry, 12345, 12345)

        kinds: list[Any] = [lambda: entry.symlink_to(outside), lambda: entry.write_bytes(LARGE)]
        if is_root():
            kinds.append(foreign)
        for number, make in enumerate(kinds):
            entry.unlink(missing_ok=True)
            make()
            path = self.add(f"x{number}", File(LARGE))
            self.assertEqual(self.inode(path), os.lstat(entry).st_ino)
            self.assert_canonical(path)
        self.assertEqual(outside.read_bytes(), LARGE)
        self.assertEqual(os.stat(outside).st_nlink, 1)

    def test_distrust(self) -> None:
        """S19: in repairs an entry with other contents is replaced, too."""
        first = self.add("first", File(LARGE))
        os.chmod(first, 0o644)
        Path(first).write_bytes(LARGE[::-1])
        os.chmod(first, 0o444)
        pool = Links(self.store, distrust=True)
        self.addCleanup(pool.close)
        good = self.add("good", File(LARGE), pool)
        again = self.add("again", File(LARGE), pool)
        self.assertEqual(Path(good).read_bytes(), LARGE)
        self.assertEqual(self.inode(good), self.inode(again))

    def test_pool_removed(self) -> None:
        """An administrator may remove the pool at any time."""
        self.add("first", File(LARGE))
        os.unlink(f"{self.pool}/{key(LARGE)}")
        os.rmdir(self.pool)
        self.add("second", File(LARGE))
        self.assertEqual(self.entries(), [key(LARGE)])

    def test_no_directory(self) -> None:
        """What cannot be a pool fails the addition, which names the file."""
        Path(self.pool).write_bytes(b"")
        error = self.assertRaises(StoreError, self.add, "x", {b"name": File(LARGE)})
        self.assertIn("cannot share 'name'", error.text)

    def test_writable_file(self) -> None:
        """A file with a mode that no item has is left alone."""
        path = Path(self.store, "x")
        path.write_bytes(LARGE)
        self.links.share(None, str(path), bytes(32), os.stat(path))
        self.assertIn("suspicious", self.links.notes[0])
        self.assertEqual(os.stat(path).st_nlink, 1)

    def test_leftover(self) -> None:
        """Names that a process of the same number left behind are in nobody's way."""
        self.add("first", File(LARGE))
        number = next(links._numbers)
        for used in range(number, number + 10):
            Path(self.store, f".tmp-link-{os.getpid()}-{used}").write_bytes(b"")
        path = self.add("second", File(LARGE))
        self.assertEqual(os.stat(path).st_nlink, 3)

    def test_collector(self) -> None:
        """A collector that removes entries and temporary names all the time does no harm."""
        done = threading.Event()

        def collect() -> None:
            while not done.is_set():
                for directory, prefix in ((self.pool, ""), (self.store, ".tmp-link")):
                    for name in os.listdir(directory):
                        if name.startswith(prefix):
                            Path(directory, name).unlink(missing_ok=True)

        os.mkdir(self.pool)
        collector = threading.Thread(target=collect)
        collector.start()
        self.addCleanup(collector.join)
        self.addCleanup(done.set)
        for number in range(60):
            tree: Tree = {b"%d" % n: File(LARGE) for n in range(5)}
            self.assertEqual(read_tree(os.fsencode(self.add(f"x{number}", tree))), tree)

    def test_others(self) -> None:
        """Several that share the same files at the same time leave all of them whole."""
        tree: Tree = {b"%d" % number: File(b"%d" % number * SMALLEST) for number in range(40)}

        def work(name: str) -> None:
            with Links(self.store) as pool:
                self.add(name, tree, pool)

        with ThreadPoolExecutor(4) as workers:
            list(workers.map(work, [f"x{number}" for number in range(4)]))
        for number in range(4):
            self.assertEqual(read_tree(os.fsencode(self.at(f"x{number}"))), tree)
        for name in os.listdir(self.at("x0")):
            self.assertEqual(os.stat(self.at(f"x1/{name}")).st_nlink, 5)
        self.assertEqual(self.leftovers(), [])
