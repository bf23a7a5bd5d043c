"""Trees as values, and archives made from them token by token, right or wrong."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st


@dataclass(frozen=True)
class File:
    contents: bytes = b""
    executable: bool = False


@dataclass(frozen=True)
class Link:
    target: bytes


Tree = File | Link | dict[bytes, "Tree"]


def s(text: bytes) -> bytes:
    """Return TEXT as a token."""
    return struct.pack("<Q", len(text)) + text + bytes(-len(text) % 8)


def words(*texts: bytes) -> bytes:
    return b"".join(map(s, texts))


def node(tree: Tree) -> bytes:
    """Return TREE as a node, without the magic word."""
    if isinstance(tree, File):
        flag = words(b"executable", b"") if tree.executable else b""
        body = s(b"regular") + flag + words(b"contents", tree.contents)
    elif isinstance(tree, Link):
        body = words(b"symlink", b"target", tree.target)
    else:
        body = s(b"directory") + b"".join(entry(name, tree[name]) for name in sorted(tree))
    return words(b"(", b"type") + body + s(b")")


def entry(name: bytes, tree: Tree) -> bytes:
    return words(b"entry", b"(", b"name", name, b"node") + node(tree) + s(b")")


def archive(tree: Tree) -> bytes:
    return s(b"nix-archive-1") + node(tree)


def directory(*parts: bytes) -> bytes:
    """Return the archive of a directory with the raw PARTS between its parentheses."""
    return words(b"nix-archive-1", b"(", b"type", b"directory") + b"".join(parts) + s(b")")


class Recorder:
    """A sink that rebuilds the tree.

    :ivar tree: the root, None so far.
    """

    def __init__(self) -> None:
        self.tree: Tree | None = None
        self._open: list[dict[bytes, Tree]] = []
        self._file: tuple[bytes, bool, int] = (b"", False, 0)
        self._contents = bytearray()

    def _add(self, name: bytes, tree: Tree) -> None:
        if self._open:
            assert name not in self._open[-1]
            self._open[-1][name] = tree
        else:
            assert name == b"" and self.tree is None
            self.tree = tree

    def directory(self, name: bytes) -> None:
        new: dict[bytes, Tree] = {}
        self._add(name, new)
        self._open.append(new)

    def end_directory(self) -> None:
        self._open.pop()

    def file(self, name: bytes, executable: bool, size: int) -> None:
        self._file = (name, executable, size)
        self._contents.clear()

    def data(self, view: memoryview) -> None:
        assert len(view) > 0
        self._contents += view

    def end_file(self) -> None:
        name, executable, size = self._file
        assert len(self._contents) == size
        self._add(name, File(bytes(self._contents), executable))

    def symlink(self, name: bytes, target: bytes) -> None:
        self._add(name, Link(target))


def read_tree(path: bytes) -> Tree:
    """Return what is on disk at PATH."""
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        return Link(os.readlink(path))
    if stat.S_ISDIR(mode):
        return {name: read_tree(path + b"/" + name) for name in os.listdir(path)}
    return File(Path(os.fsdecode(path)).read_bytes(), bool(mode & 0o100))


def write_tree(path: bytes, tree: Tree) -> None:
    """Make TREE at PATH by ordinary means."""
    if isinstance(tree, Link):
        os.symlink(tree.target, path)
    elif isinstance(tree, File):
        Path(os.fsdecode(path)).write_bytes(tree.contents)
        os.chmod(path, 0o755 if tree.executable else 0o644)
    else:
        os.mkdir(path)
        for name, child in tree.items():
            write_tree(path + b"/" + name, child)


VECTOR: Tree = {b"a": File(b"x\n", True), b"B": File(), b"l": Link(b"a")}

names = st.one_of(
    st.sampled_from([b"a", b"B", b"a-b", b"a.b", b"a_b", b"ab", b"\xff\xfe", b"new\nline", b" "]),
    st.binary(min_size=1, max_size=20).filter(
        lambda name: b"/" not in name and 0 not in name and name not in (b".", b"..")
    ),
)
targets = st.binary(min_size=1, max_size=40).filter(lambda target: 0 not in target)
leaves = st.one_of(st.builds(File, st.binary(max_size=40), st.booleans()), st.builds(Link, targets))
trees = st.recursive(leaves, lambda inner: st.dictionaries(names, inner, max_size=4), max_leaves=8)
