"""Finding the file of a tree that has a certain reference in it."""

from __future__ import annotations

import os
import stat

from guixd.formats.references import Scanner
from guixd.store.descent import Check, Descent, go_on, walk

_BLOCK = 256 << 10


class _Found(Exception):
    pass


def find_reference(dir_fd: int | None, name: str, hash_part: str, check: Check = go_on) -> str:
    """Return the name of a file at or below NAME that has HASH_PART in it; empty if none has.

    Contents of files, targets of symbolic links and names count.  Blocks.

    :param check: called after each block.
    :raises OSError: from any call.
    :raises StoreError: the tree changed meanwhile.
    """

    def visit(down: Descent, entry: str, status: os.stat_result) -> None:
        scanner = Scanner([hash_part])
        if stat.S_ISLNK(status.st_mode):
            scanner.update(os.fsencode(os.readlink(entry, dir_fd=down.fd)))
        elif stat.S_ISREG(status.st_mode):
            _scan(scanner, entry, down.fd, check)
        # The name of the tree itself is no part of it.
        if scanner.found or (down.names and hash_part in entry):
            raise _Found(down.path(entry))

    try:
        walk(dir_fd, name, visit, check=check)
    except _Found as found:
        return str(found)
    return ""


def _scan(scanner: Scanner, name: str, dir_fd: int | None, check: Check) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        while scanner.wanted and (block := os.read(fd, _BLOCK)):
            check()
            scanner.update(block)
    finally:
        os.close(fd)
