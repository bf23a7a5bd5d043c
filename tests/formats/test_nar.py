"""The archive format: canonical form only, however the bytes come."""

from __future__ import annotations

import hashlib
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadArchive
from guixd.formats import nar
from tests.archives import (
    VECTOR,
    File,
    Link,
    Recorder,
    Tree,
    archive,
    directory,
    entry,
    node,
    s,
    trees,
    words,
)


def parse(data: bytes, step: int = 1 << 20) -> Tree | None:
    """Parse DATA, all of which must be one archive, in blocks of STEP bytes."""
    recorder = Recorder()
    parser = nar.NarParser(recorder)
    used = sum(parser.feed(data[at : at + step]) for at in range(0, len(data), step))
    parser.finish()
    assert used == parser.consumed
    if used < len(data):
        raise BadArchive("there is more than an archive")
    return recorder.tree


def write(tree: Tree) -> bytes:
    """Serialise TREE with the pieces of the module under test."""

    def write_node(tree: Tree) -> bytes:
        if isinstance(tree, Link):
            return nar.symlink_node(tree.target)
        if isinstance(tree, File):
            size = len(tree.contents)
            header = nar.file_header(size, tree.executable)
            return header + tree.contents + nar.padding(size) + nar.CLOSE
        parts = (
            nar.entry_header(name) + write_node(tree[name]) + nar.CLOSE for name in sorted(tree)
        )
        return nar.DIRECTORY_HEADER + b"".join(parts) + nar.CLOSE

    return nar.MAGIC + write_node(tree)


class VectorTests(SynchronousTestCase):
    def test_hashes(self) -> None:
        """N1 N3: archives of all kinds of nodes have the sizes and hashes known elsewhere."""
        for tree, size, digest in (
            (
                File(b"hi\n", True),
                152,
                "b55bce1ab38788765364491154df0c575a4959c247abcd0d2d24a6dba4b10da7",
            ),
            (
                Link(b"foo"),
                120,
                "37b1f4f8d541ad7b9de40a934dee0912d8920414a5cd3141a123eb9ade82884f",
            ),
            ({}, 96, "a50a5ab6d992f5598edd92105059fae9acfc192981e08bd88534c2167e92526a"),
            (VECTOR, 696, "7ce03908c1c1d5b300aecd6d59c3884e3e4b39b307c96c4431feb35c1ec1de96"),
            (
                File(b"hi"),
                120,
                "2252d4b78c94e8c7ace4e3317b78bdfe64bc8e3970a64eb6d2f7c2a443c0c3fc",
            ),
            (
                File(b"hi", True),
                152,
                "b881d2326aa0a4f89797e8619d8a9d6c6dfa630ee6a274a58edaf355f2c4d9b0",
            ),
            (
                File(b"Hello, store!\n"),
                128,
                "4ab03ed7a510387c0b93b322d17a4fa2dc4493a75e227174208a35c5e9c302dd",
            ),
        ):
            written = write(tree)
            self.assertEqual(len(written), size)
            if isinstance(tree, File):
                self.assertEqual(nar.file_size(len(tree.contents), tree.executable), size)
            self.assertEqual(hashlib.sha256(written).hexdigest(), digest)
            self.assertEqual(parse(written), tree)

    def test_bytes(self) -> None:
        """N1: the archive of a small file, byte by byte."""
        expected = bytes.fromhex(
            "0d00000000000000 6e69782d617263686976652d31000000"
            "0100000000000000 2800000000000000"
            "0400000000000000 7479706500000000"
            "0700000000000000 726567756c617200"
            "0800000000000000 636f6e74656e7473"
            "0300000000000000 68690a0000000000"
            "0100000000000000 2900000000000000"
        )
        self.assertEqual(nar.nar_of_file(b"hi\n"), expected)
        self.assertEqual(
            hashlib.sha256(expected).hexdigest()[:16],
            "10551daed7fa467d",
        )

    def test_padding(self) -> None:
        """N4: contents of 0 or 8 bytes have no padding."""
        self.assertEqual(len(nar.nar_of_file(b"")), 112)
        self.assertEqual(len(nar.nar_of_file(bytes(8))), 120)
        self.assertEqual(len(nar.nar_of_file(bytes(9))), 128)


class RoundTripTests(SynchronousTestCase):
    @settings(deadline=None, max_examples=60)
    @given(trees, st.integers(1, 200), st.binary(max_size=9))
    def test_any_tree_any_blocks(self, tree: Tree, step: int, tail: bytes) -> None:
        """N2 N12: what was written is read, whatever the blocks, and not a byte more."""
        written = write(tree)
        self.assertEqual(written, archive(tree))
        self.assertEqual(parse(written, step), tree)
        recorder = Recorder()
        parser = nar.NarParser(recorder)
        data = written + tail
        used = 0
        for at in range(0, len(data), step):
            used += parser.feed(memoryview(data)[at : at + step])
        self.assertTrue(parser.done)
        self.assertEqual(used, len(written))
        self.assertEqual(recorder.tree, tree)
        self.assertEqual(parser.feed(b"more"), 0)

    @settings(deadline=None, max_examples=100)
    @given(trees, st.data())
    def test_accepted_is_canonical(self, tree: Tree, data: st.DataObject) -> None:
        """N5 N7: of spoilt archives only such are accepted that are canonical themselves."""
        spoilt = bytearray(archive(tree))
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(spoilt) - 1))
            spoilt[at] ^= data.draw(st.integers(1, 255))
        try:
            result = parse(bytes(spoilt))
        except BadArchive:
            return
        assert result is not None
        self.assertEqual(archive(result), bytes(spoilt))

    def test_each_byte_matters(self) -> None:
        """N5: no byte of an archive can be changed unnoticed, least of all padding."""
        original = archive({**VECTOR, b"sub": {b"deep": Link(b"12345678")}})  # type: ignore[dict-item]
        accepted = 0
        for at in range(len(original)):
            spoilt = bytearray(original)
            spoilt[at] ^= 0x20
            try:
                result = parse(bytes(spoilt))
            except BadArchive:
                continue
            assert result is not None
            self.assertEqual(archive(result), bytes(spoilt))
            accepted += 1
        # Letters of names, targets and contents: "B" "a" "l", "a", "x\n", and so on.
        self.assertGreater(accepted, 5)
        self.assertLess(accepted, 30)

    def test_truncated(self) -> None:
        """N6: an archive that ends anywhere too early is an error and never done."""
        whole = archive(VECTOR)
        for size in range(len(whole)):
            parser = nar.NarParser(Recorder())
            self.assertEqual(parser.feed(whole[:size]), size)
            self.assertFalse(parser.done)
            self.assertRaises(BadArchive, parser.finish)


FILE = node(File(b"x"))


class StrictnessTests(SynchronousTestCase):
    def refuse(self, data: bytes) -> None:
        """Check that DATA is refused, at once and byte by byte."""
        for step in (1 << 20, 1, 13):
            with self.assertRaises(BadArchive):
                parse(data, step)

    def test_grammar(self) -> None:
        """N7: each departure from the canonical form is refused."""
        magic = s(b"nix-archive-1")
        start = words(b"(", b"type")
        end = s(b")")
        for data in (
            b"",
            s(b"nix-archive-2") + FILE,
            b"garbage that is longer than any magic word",
            b"\xff" * 64,
            magic + s(b"(") + s(b")"),
            magic + words(b"(", b"kind", b"regular", b"contents", b"", b")"),
            magic + start + words(b"fifo", b")"),
            magic + start + s(b"regular") + end,
            magic + start + words(b"regular", b"type", b"regular", b"contents", b"x", b")"),
            magic + start + words(b"regular", b"contents", b"x", b"contents", b"y", b")"),
            magic + start + words(b"regular", b"contents", b"x", b"executable", b"", b")"),
            magic + start + words(b"regular", b"executable", b"y", b"contents", b"x", b")"),
            magic + start + words(b"regular", b"executable", b"") * 2 + words(b"contents", b"x"),
            magic + start + words(b"regular", b"contents", b"x", b"color", b"red", b")"),
            magic + start + words(b"symlink", b")"),
            magic + start + words(b"symlink", b"target", b"", b")"),
            magic + start + words(b"symlink", b"target", b"a\0b", b")"),
            magic + start + words(b"symlink", b"target", b"a", b"target", b"b", b")"),
            magic + start + words(b"symlink", b"target", b"x" * 4096, b")"),
            magic + start + words(b"regular", b"contents") + struct.pack("<Q", 1 << 63),
            directory(words(b"entry", b"(", b"name", b"a", b")")),
            directory(words(b"entry", b"(", b"node") + FILE + words(b"name", b"a", b")")),
            directory(words(b"entry", b"(", b"name", b"a", b"name", b"b", b"node") + FILE + end),
            directory(words(b"entry", b"(", b"name", b"a", b"node") + FILE * 2 + end),
            directory(words(b"entry", b"(", b"name", b"a", b"node") + FILE),
            directory(entry(b"b", File()), entry(b"a", File())),
            directory(entry(b"a", File()), entry(b"a", File())),
            directory(entry(b"a-b", {}), entry(b"a", {})),
            directory(s(b"contents")),
        ):
            self.refuse(data)

    def test_bad_names(self) -> None:
        """N8 N9: names that lead elsewhere, in every kind of node, are refused."""
        kinds: tuple[Tree, ...] = (File(b"x"), File(b"x", True), Link(b"t"), {})
        for name in (b"", b".", b"..", b"a/b", b"/", b"/etc", b"a\0", b"\0", b"n" * 256):
            for tree in kinds:
                self.refuse(directory(entry(name, tree)))
        for tree in kinds:
            longest = directory(entry(b"n" * 255, tree))
            self.assertEqual(parse(longest, 100), {b"n" * 255: tree})
            self.refuse(directory(entry(b"d", Link(b"/tmp")), entry(b"d", tree)))

    def test_names_equal_but_for_case(self) -> None:
        """N7: names that differ in case only are different names."""
        tree: Tree = {b"README": File(), b"Readme": File(), b"readme": File()}
        self.assertEqual(parse(archive(tree)), tree)

    def test_refused_as_soon_as_wrong(self) -> None:
        """N6: a wrong token is refused when it comes; nothing more is waited for."""
        parser = nar.NarParser(Recorder())
        parser.feed(archive({})[:80])
        with self.assertRaises(BadArchive):
            parser.feed(b"\x03")  # no token that may stand here has this length
        parser = nar.NarParser(Recorder())
        with self.assertRaises(BadArchive):
            parser.feed(words(b"nix-archive-1", b"(", b"tyqe")[:-1])

    def test_depth(self) -> None:
        """CVE-2026-44028: deep nesting is bounded, and takes no recursion to refuse."""

        def nested(depth: int) -> bytes:
            opening = words(b"(", b"type", b"directory")
            inner = words(b"entry", b"(", b"name", b"d", b"node")
            begin = s(b"nix-archive-1") + (opening + inner) * (depth - 1) + opening
            return begin + s(b")") * (2 * depth - 1)

        recorder = Recorder()
        parser = nar.NarParser(recorder)
        parser.feed(nested(512))
        self.assertTrue(parser.done)
        for depth in (513, 100_000):
            with self.assertRaises(BadArchive):
                nar.NarParser(Recorder()).feed(nested(depth))
        tight = nar.NarParser(Recorder(), limits=nar.NarLimits(depth=2))
        with self.assertRaises(BadArchive):
            tight.feed(nested(3))

    def test_announced_size_costs_nothing(self) -> None:
        """N10: sizes are 64 bits wide, and contents pass through without being gathered."""
        size = 5 << 30
        views: list[int] = []

        class Counter(Recorder):
            def data(self, view: memoryview) -> None:
                views.append(len(view))

            def end_file(self) -> None:
                views.append(-1)

        parser = nar.NarParser(Counter())
        parser.feed(nar.MAGIC + nar.file_header(size))
        block = memoryview(bytearray(64 << 20))
        for _ in range(size // len(block)):
            self.assertEqual(parser.feed(block), len(block))
        self.assertFalse(parser.done)
        parser.feed(nar.CLOSE)
        self.assertTrue(parser.done)
        self.assertEqual(views, [len(block)] * 80 + [-1])
        self.assertEqual(parser.consumed, nar.file_size(size))
