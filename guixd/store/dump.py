"""Serialising files and trees as NAR, and hashing them (spec: nar §2)."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

from guixd.errors import StoreError
from guixd.formats import nar
from guixd.formats.hashes import Hash
from guixd.formats.references import Scanner
from guixd.store.descent import Check, Descent, go_on
from guixd.store.links import Links, end_key, is_shared, start_key

Block = bytes | memoryview
_BLOCK = 256 * 1024  # fits the processor's cache
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Measured:
    """What one pass over a tree's archive told."""

    digest: bytes
    """The sha256 of the archive, 32 bytes."""
    size: int
    """The size of the archive in bytes."""
    found: frozenset[str]
    """The hash parts that occur in it, of those looked for."""


def dump(
    dir_fd: int | None,
    name: str,
    write: Callable[[Block], object],
    links: Links | None = None,
    check: Check = go_on,
) -> int:
    """Give the archive of NAME in the directory DIR_FD to WRITE, in blocks up to 256 KiB.

    A block is good only until WRITE returns.  A file that grows meanwhile is cut.

    :param dir_fd: None if NAME is a file name whose directories can be trusted.
    :param links: where the files are shared with equal ones, in the same pass; the tree
        must have the form of the store.
    :param check: called before each block is given.
    :return: size of the archive in bytes.
    :raises StoreError: an unsupported type, a file that cannot be read or shrank; the
        text names it.
    """
    size = 0
    for block in blocks(dir_fd, name, links):
        check()
        write(block)
        size += len(block)
    return size


def blocks(
    dir_fd: int | None, name: str, links: Links | None = None
) -> Generator[Block, None, None]:
    """Give the archive of NAME in blocks, each good until the next is asked for; see `dump`.

    To be closed if it is not wanted to the end.
    """
    with Descent(dir_fd) as down:
        yield from _Dump(down, links).run(name)


def dump_path(path: str, write: Callable[[Block], object]) -> int:
    """Give the archive of the file or tree PATH to WRITE; see `dump`."""
    return dump(None, path, write)


def hash_and_scan(
    dir_fd: int | None,
    name: str,
    hash_parts: Iterable[str] = (),
    links: Links | None = None,
    check: Check = go_on,
) -> Measured:
    """Hash the archive of NAME and look for HASH_PARTS in it, in one pass.

    :param links: as for `dump`.
    :param check: as for `dump`.
    :raises StoreError: as for `dump`.
    """
    digest = hashlib.sha256()
    scanner = Scanner(hash_parts)

    def take(block: Block) -> None:
        digest.update(block)
        scanner.update(block)

    size = dump(dir_fd, name, take if scanner.wanted else digest.update, links, check)
    return Measured(digest.digest(), size, frozenset(scanner.found))


def hash_nar(dir_fd: int | None, name: str, digest: Hash, check: Check = go_on) -> int:
    """Update DIGEST with the archive of NAME and return the archive's size in bytes.

    :param check: as for `dump`.
    """
    return dump(dir_fd, name, digest.update, check=check)


def hash_file(dir_fd: int | None, name: str, digest: Hash, check: Check = go_on) -> os.stat_result:
    """Update DIGEST with the contents of the regular file NAME and return its status.

    :param check: called after each block.
    :raises StoreError: it is not a regular file or cannot be read.
    """
    try:
        fd = os.open(name, _FILE_FLAGS, dir_fd=dir_fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise StoreError(f"file '{name}' is not a regular file")
            while block := os.read(fd, _BLOCK):
                check()
                digest.update(block)
            return status
        finally:
            os.close(fd)
    except OSError as error:
        raise StoreError(f"cannot read '{name}': {error.strerror}") from error


class _Dump:
    """One serialisation in progress."""

    def __init__(self, down: Descent, links: Links | None) -> None:
        self._down = down
        self._links = links
        self._key: Hash | None = None
        self._pieces: list[bytes] = []  # not yet given
        self._gathered = 0
        self._buffer: memoryview | None = None

    def run(self, name: str) -> Generator[Block, None, None]:
        down = self._down
        self._put(nar.MAGIC)
        pending: list[list[str]] = []
        entry = name
        while True:
            names = None
            try:
                mode = os.stat(entry, dir_fd=down.fd, follow_symlinks=False).st_mode
                if stat.S_ISREG(mode):
                    yield from self._file(entry)
                else:
                    names = self._other(entry, mode)
            except OSError as error:
                raise StoreError(f"cannot read '{down.path(entry)}': {error.strerror}") from error
            if names is not None:
                pending.append(names)
            elif pending:
                self._put(nar.CLOSE)
            while pending and not pending[-1]:
                pending.pop()
                down.leave()
                self._put(nar.CLOSE_ENTRY if pending else nar.CLOSE)
            if not pending:
                yield self._gathering()
                return
            entry = pending[-1].pop()
            self._put(nar.entry_header(os.fsencode(entry)))
            if self._gathered >= _BLOCK // 2:
                yield self._gathering()

    def _other(self, name: str, mode: int) -> list[str] | None:
        """Put a link, or enter a directory and return its names, last first."""
        if stat.S_ISLNK(mode):
            self._put(nar.symlink_node(os.fsencode(os.readlink(name, dir_fd=self._down.fd))))
        elif stat.S_ISDIR(mode):
            self._put(nar.DIRECTORY_HEADER)
            names = os.listdir(self._down.enter(name))
            names.sort(key=os.fsencode, reverse=True)
            return names
        else:
            raise StoreError(f"file '{self._down.path(name)}' has an unsupported type")
        return None

    def _file(self, name: str) -> Generator[Block, None, None]:
        fd = os.open(name, _FILE_FLAGS, dir_fd=self._down.fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise StoreError(f"file '{self._down.path(name)}' has an unsupported type")
            size = status.st_size
            executable = bool(status.st_mode & stat.S_IXUSR)
            if self._links is not None and is_shared(status):
                self._key = start_key(size, executable)
            self._put(nar.file_header(size, executable))
            if size > _BLOCK // 4:
                yield self._gathering()
                yield from self._large(fd, size, name)
            elif self._small(fd, size) < size:
                raise self._shrunk(name)
        finally:
            os.close(fd)
        self._put(nar.padding(size) + nar.CLOSE)
        if self._links is not None and self._key is not None:
            key, self._key = end_key(self._key, size), None
            self._links.share(self._down.fd, name, key, status)

    def _small(self, fd: int, size: int) -> int:
        done = 0
        while done < size and (contents := os.read(fd, size - done)):
            self._put(contents)
            if self._key is not None:
                self._key.update(contents)
            done += len(contents)
        return done

    def _large(self, fd: int, size: int, name: str) -> Generator[Block, None, None]:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_BLOCK))
        left = size
        while left:
            got = os.readv(fd, [self._buffer[: min(_BLOCK, left)]])
            if not got:
                raise self._shrunk(name)
            yield self._buffer[:got]
            if self._key is not None:
                self._key.update(self._buffer[:got])
            left -= got

    def _shrunk(self, name: str) -> StoreError:
        return StoreError(f"file '{self._down.path(name)}' shrank while it was read")

    def _put(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._gathered += len(piece)

    def _gathering(self) -> bytes:
        """Take what was put, which is to be given."""
        block = b"".join(self._pieces)
        self._pieces.clear()
        self._gathered = 0
        return block
