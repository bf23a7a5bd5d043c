"""Archives of files on disk, and files on disk from archives."""

from __future__ import annotations

import hashlib
import os
import socket
import stat

from hypothesis import given, settings

from guixd.errors import BadArchive, StoreError
from guixd.formats.nar import MAGIC, NarParser, file_header, file_size
from guixd.store.trees import (
    TreeWriter,
    canonicalise,
    dump,
    dump_path,
    hash_and_scan,
    hash_file,
    remove_path,
)
from tests.archives import (
    VECTOR,
    File,
    Link,
    Tree,
    archive,
    directory,
    entry,
    read_tree,
    trees,
    words,
    write_tree,
)
from tests.support import DirectoryTestCase, make_deep, open_files

PART = "0123456789abcdfghijklmnpqrsvwxyz"


def restore(data: bytes, path: str, step: int = 1 << 20) -> None:
    """Restore the archive DATA at PATH."""
    writer = TreeWriter(None, path)
    parser = NarParser(writer)
    try:
        for at in range(0, len(data), step):
            parser.feed(data[at : at + step])
        parser.finish()
        writer.finish()
    finally:
        writer.close()


def dumped(path: str) -> bytes:
    blocks: list[bytes] = []
    size = dump_path(path, lambda block: blocks.append(bytes(block)))
    data = b"".join(blocks)
    assert size == len(data)
    return data


def statuses(path: str) -> list[os.stat_result]:
    """Return the status of PATH and of everything below it."""
    found = [os.lstat(path)]
    for top, directories, files in os.walk(path):
        found += [os.lstat(os.path.join(top, name)) for name in directories + files]
    return found


class RoundTripTests(DirectoryTestCase):
    @settings(deadline=None, max_examples=40)
    @given(trees)
    def test_any_tree(self, tree: Tree) -> None:
        """N2: serialise, restore, serialise gives the same bytes, for any tree."""
        try:
            write_tree(os.fsencode(self.at("made")), tree)
            expected = archive(tree)
            self.assertEqual(dumped(self.at("made")), expected)
            restore(expected, self.at("restored"), 37)
            self.assertEqual(read_tree(os.fsencode(self.at("restored"))), tree)
            self.assertEqual(dumped(self.at("restored")), expected)
        finally:
            remove_path(self.at("made"))
            remove_path(self.at("restored"))

    def test_order(self) -> None:
        """N3: entries are in the order of bytes."""
        names = (b"B", b"a", b"a-b", b"a.b", b"a_b", b"ab", b"\xc3\xa9", b"\xff")
        tree: Tree = {name: File() for name in reversed(names)}
        write_tree(os.fsencode(self.at("t")), tree)
        data = dumped(self.at("t"))
        places = [data.index(words(b"name", name)) for name in names]
        self.assertEqual(places, sorted(places))

    def test_large_files(self) -> None:
        """N2: files that are larger than every buffer, at sizes around those of blocks."""
        block = 256 * 1024
        for size in (block // 4, block // 4 + 1, block - 1, 3 * block, 3 * block + 5):
            contents = os.urandom(1000) * (size // 1000) + bytes(size % 1000)
            tree: Tree = {b"a": File(contents), b"b": File(b"x", True), b"c": {}}
            restore(archive(tree), self.at("t"), 100_003)
            self.assertEqual(dumped(self.at("t")), archive(tree))
            remove_path(self.at("t"))

    def test_group_execute_alone(self) -> None:
        """N13: a file that only its group may execute is not executable."""
        write_tree(os.fsencode(self.at("f")), File(b"x"))
        os.chmod(self.at("f"), 0o654)
        self.assertEqual(dumped(self.at("f")), archive(File(b"x")))
        os.chmod(self.at("f"), 0o744)
        self.assertEqual(dumped(self.at("f")), archive(File(b"x", True)))

    def test_deep(self) -> None:
        """CVE-2026-44028: a tree far deeper than names can be long is serialised and removed."""
        make_deep(self.directory, "deep" * 5, 600)
        before = open_files()
        blocks: list[bytes] = []
        canonicalise(self.fd, "deep" * 5, None, set())
        size = dump(self.fd, "deep" * 5, lambda block: blocks.append(bytes(block)))
        self.assertEqual(size, 96 + 599 * (88 + 24 + 96 - 24))
        with self.assertRaises(BadArchive):
            restore(b"".join(blocks), self.at("copy"))
        remove_path(self.at("deep" * 5))
        remove_path(self.at("copy"))
        self.assertEqual(os.listdir(self.fd), [])
        self.assertEqual(open_files(), before)


class DumpTests(DirectoryTestCase):
    def test_special_files(self) -> None:
        """N11: a file of another type is an error that names it."""
        os.mkdir(self.at("t"))
        os.mkfifo(self.at("t/pipe"))
        with self.assertRaises(StoreError) as caught:
            dumped(self.at("t"))
        self.assertIn("t/pipe", caught.exception.text)
        self.assertIn("unsupported type", caught.exception.text)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.at("socket"))
        self.assertRaises(StoreError, dumped, self.at("socket"))

    def test_missing(self) -> None:
        """N11: a missing file is an error that names it."""
        with self.assertRaises(StoreError) as caught:
            dumped(self.at("nothing"))
        self.assertIn("nothing", caught.exception.text)

    def test_file_that_shrinks_or_grows(self) -> None:
        """N11: a file that shrinks while it is read is an error, one that grows is cut."""
        size = 4 * 256 * 1024
        write_tree(os.fsencode(self.at("f")), File(bytes(size)))
        seen = 0

        def resize(block: bytes | memoryview, to: int) -> None:
            nonlocal seen
            seen += len(block)
            if seen > 256 * 1024:
                os.truncate(self.at("f"), to)

        self.assertEqual(dump_path(self.at("f"), lambda b: resize(b, 2 * size)), file_size(size))
        os.truncate(self.at("f"), size)
        seen = 0
        with self.assertRaises(StoreError) as caught:
            dump_path(self.at("f"), lambda b: resize(b, 100))
        self.assertIn("'" + self.at("f") + "'", caught.exception.text)

    def test_sparse(self) -> None:
        """N10: a file of 5 GiB has its true size, and comes in blocks of bounded size."""
        size = 5 << 30
        with open(self.at("f"), "wb") as file:  # noqa: PTH123
            file.truncate(size)
        blocks: list[int] = []
        before = open_files()

        class EnoughError(Exception):
            pass

        def measure(block: bytes | memoryview) -> None:
            if not blocks:
                self.assertEqual(block, MAGIC + file_header(size))
            blocks.append(len(block))
            if sum(blocks) > 64 << 20:
                raise EnoughError

        self.assertRaises(EnoughError, dump_path, self.at("f"), measure)
        self.assertLessEqual(max(blocks), 1 << 20)
        self.assertEqual(open_files(), before)

    def test_hash_and_scan(self) -> None:
        """B24: one pass gives hash, size and what is in names, link targets and contents."""
        parts = [PART[n:] + PART[:n] for n in range(4)]
        tree: Tree = {
            parts[0].encode(): File(b"x" * 300_000 + parts[1].encode() + b"x" * 70_000),
            b"link": Link(b"/gnu/store/" + parts[2].encode() + b"-name"),
        }
        write_tree(os.fsencode(self.at("t")), tree)
        measured = hash_and_scan(self.fd, "t", parts)
        self.assertEqual(measured.found, set(parts[:3]))
        self.assertEqual(measured.digest, hashlib.sha256(archive(tree)).digest())
        self.assertEqual(measured.size, len(archive(tree)))
        self.assertEqual(hash_and_scan(self.fd, "t").found, set())

    def test_hash_file(self) -> None:
        """B23: the hash of a file's contents; a link or directory is refused."""
        write_tree(os.fsencode(self.at("f")), File(b"x" * 1_000_000, True))
        os.symlink("f", self.at("link"))
        digest = hashlib.sha1()
        status = hash_file(self.fd, "f", digest)
        self.assertEqual(digest.digest(), hashlib.sha1(b"x" * 1_000_000).digest())
        self.assertTrue(status.st_mode & 0o100)
        for name in ("link", ".", "missing"):
            self.assertRaises(StoreError, hash_file, self.fd, name, hashlib.sha1())


class RestoreTests(DirectoryTestCase):
    def test_metadata(self) -> None:
        """S4: what is restored has the store's modes and time, whatever the umask."""
        previous = os.umask(0o077)
        self.addCleanup(os.umask, previous)
        restore(archive({b"sub": VECTOR, b"x": File(b"x", True), b"f": File()}), self.at("t"))
        for status in statuses(self.at("t")):
            self.assertEqual(status.st_mtime_ns, 1_000_000_000)
            self.assertEqual(status.st_uid, os.geteuid())
            if not stat.S_ISLNK(status.st_mode):
                self.assertIn(stat.S_IMODE(status.st_mode), (0o444, 0o555))
        self.assertEqual(stat.S_IMODE(os.lstat(self.at("t/sub")).st_mode), 0o555)
        self.assertEqual(stat.S_IMODE(os.lstat(self.at("t/f")).st_mode), 0o444)

    def test_hostile_archives(self) -> None:
        """N8 N9, CVE-2024-45593: hostile archives leave everything outside as it was."""
        sentinel = self.at("sentinel")
        os.mkdir(sentinel)
        link = entry(b"d", Link(os.fsencode(sentinel)))
        inside: Tree = {b"evil": File(b"evil")}
        for number, data in enumerate(
            (
                directory(link, entry(b"d", inside)),
                directory(link, entry(b"d", File(b"evil"))),
                directory(link, entry(b"d/evil", File(b"evil"))),
                directory(entry(b"../sentinel/evil", File(b"evil"))),
                directory(entry(b"..", inside)),
                directory(entry(b".", inside)),
                directory(entry(b"", inside)),
                directory(entry(os.fsencode(sentinel) + b"/evil", File(b"evil"))),
                directory(entry(b"e", {b"d": Link(b"..")}), link, entry(b"d", inside)),
            )
        ):
            for step in (1 << 20, 5):
                place = self.at(f"t{number}-{step}")
                self.assertRaises(BadArchive, restore, data, place, step)
                remove_path(place)
        self.assertEqual(os.listdir(sentinel), [])
        self.assertEqual(os.listdir(self.directory), ["sentinel"])

    def test_existing_target(self) -> None:
        """N9: nothing that exists is written to or through."""
        write_tree(os.fsencode(self.at("f")), File(b"mine"))
        os.symlink("f", self.at("link"))
        os.symlink("new", self.at("dangling"))
        for name in ("f", "link", "dangling"):
            for tree in (File(b"other"), {b"x": File(b"other")}, Link(b"other")):
                with self.assertRaises(StoreError) as caught:
                    restore(archive(tree), self.at(name))
                self.assertIn("File exists", caught.exception.text)
        self.assertEqual(read_tree(os.fsencode(self.at("f"))), File(b"mine"))
        self.assertEqual(sorted(os.listdir(self.directory)), ["dangling", "f", "link"])

    def test_error_is_kept_until_the_end(self) -> None:
        """P14: the archive is read on after an error, and nothing stays open."""
        before = open_files()
        writer = TreeWriter(self.fd, "missing/name")
        parser = NarParser(writer)
        data = archive({b"sub": VECTOR})
        self.assertEqual(parser.feed(data), len(data))
        self.assertTrue(parser.done)
        self.assertRaises(StoreError, writer.finish)
        self.assertEqual(open_files(), before)

    def test_more_than_the_disk_holds(self) -> None:
        """N10: a file larger than the free space is refused before anything is written."""
        writer = TreeWriter(self.fd, "f")
        NarParser(writer).feed(MAGIC + file_header(1 << 60))
        self.assertIsNotNone(writer.error)
        with self.assertRaises(StoreError) as caught:
            writer.finish()
        self.assertIn("no space", caught.exception.text)
        self.assertEqual(os.stat(self.at("f")).st_size, 0)
