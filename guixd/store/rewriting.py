"""Replacing hash parts all over a tree (spec: build §9)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from guixd.formats.nar import NarParser
from guixd.formats.path import HASH_LENGTH
from guixd.store.descent import Check, go_on
from guixd.store.dump import dump
from guixd.store.restore import TreeWriter

_KEPT = HASH_LENGTH - 1


def replacer(hash_parts: Mapping[str, str]) -> Callable[[bytes], bytes]:
    """Return a function that replaces each key of HASH_PARTS by its value."""
    table = {old.encode(): new.encode() for old, new in hash_parts.items()}
    pattern = re.compile(b"|".join(map(re.escape, table)))
    return lambda text: pattern.sub(lambda match: table[match[0]], text)


def rewrite(
    dir_fd: int, name: str, new: str, hash_parts: Mapping[str, str], check: Check = go_on
) -> None:
    """Copy the tree NAME to NEW in the same directory, with other HASH_PARTS in it.

    They are replaced in the contents of files, in names and in the targets of links.
    The copy has the metadata of the store.  It takes little memory, however large
    the files are; it blocks.

    :param check: called after each block.
    :raises StoreError: the tree cannot be read, or the copy not be written.
    """
    writer = TreeWriter(dir_fd, new)
    try:
        parser = NarParser(_Rewriter(writer, replacer(hash_parts)))
        dump(dir_fd, name, parser.feed, check=check)
        parser.finish()
        writer.finish()
    finally:
        writer.close()


class _Rewriter:
    """A `NarSink` that passes everything on, rewritten."""

    def __init__(self, writer: TreeWriter, replace: Callable[[bytes], bytes]) -> None:
        self._writer = writer
        self._replace = replace
        self._rest = b""  # of the current file: what may begin a hash part

        self.end_directory = writer.end_directory

    def directory(self, name: bytes) -> None:
        self._writer.directory(self._replace(name))

    def file(self, name: bytes, executable: bool, size: int) -> None:
        self._writer.file(self._replace(name), executable, size)

    def data(self, view: memoryview) -> None:
        block = self._replace(self._rest + view)
        self._rest = block[-_KEPT:]
        self._write(block[:-_KEPT])

    def end_file(self) -> None:
        self._write(self._rest)
        self._rest = b""
        self._writer.end_file()

    def symlink(self, name: bytes, target: bytes) -> None:
        self._writer.symlink(self._replace(name), self._replace(target))

    def _write(self, block: bytes) -> None:
        if block:
            self._writer.data(memoryview(block))
