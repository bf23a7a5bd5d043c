"""Compares what the database says with what is on disk (op 35; spec: store §11)."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import ELOOP

from guixd.errors import StoreError
from guixd.formats.nar import file_size, nar_of_file
from guixd.formats.path import StoreDirectory, StorePath
from guixd.store.descent import DIRECTORY_FLAGS
from guixd.store.dump import hash_nar
from guixd.store.items import Row
from guixd.store.links import FILE_FLAGS
from guixd.store.queries import Queries

UNKNOWN = "sha256:" + 64 * "0"
"""How the database says that it does not know the hash of an item."""
_SMALL = 64 * 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """An item that is not as the database says, or that the database does not know well."""

    row: Row
    digest: bytes = b""
    """The sha256 of its archive now; empty if it cannot be read."""
    size: int = 0
    """Bytes of the archive."""
    error: str = ""
    """Why it cannot be read."""

    @property
    def is_incomplete(self) -> bool:
        """Whether only the database lacks something."""
        text = self.row.hash_text
        return not self.error and text in (UNKNOWN, f"sha256:{self.digest.hex()}")


class _Stopped(Exception):
    """The client has left."""


class Verification:
    """Reads items; several threads may do parts of it.

    :param store: the file name of the store directory.
    """

    def __init__(self, store: str) -> None:
        self._store = store
        self._stopped = False

    def stop(self) -> None:
        """Let `check` come to an early end, wherever it is."""
        self._stopped = True

    def check(self, rows: Sequence[Row]) -> list[Finding]:
        """Read the items ROWS, which lie in the store; return those of interest; blocks."""
        store = os.open(self._store, DIRECTORY_FLAGS & ~os.O_NOFOLLOW)
        found: list[Finding] = []
        try:
            for row in rows:
                try:
                    digest, size = self._measure(store, row.path.base)
                except StoreError as error:
                    found.append(Finding(row, error=error.text))
                except OSError as error:
                    text = f"cannot read '{row.path}': {error.strerror}"
                    found.append(Finding(row, error=text))
                else:
                    if row.hash_text != f"sha256:{digest.hex()}" or not row.nar_size:
                        found.append(Finding(row, digest, size))
        except _Stopped:
            return []
        finally:
            os.close(store)
        return found

    def _measure(self, store: int, base: str) -> tuple[bytes, int]:
        """Return hash and size of the archive of the item BASE."""
        self._go_on()
        digest = hashlib.sha256()
        contents = _read_small(store, base)
        if contents is not None:
            text, executable = contents
            digest.update(nar_of_file(text, executable))
            return digest.digest(), file_size(len(text), executable)
        size = hash_nar(store, base, digest, self._go_on)
        return digest.digest(), size

    def _go_on(self) -> None:
        if self._stopped:
            raise _Stopped


def _read_small(store: int, base: str) -> tuple[bytes, bool] | None:
    """Return the contents of BASE and whether it is executable, if it is a small file.

    Most items are, and this is several times faster than the way for trees.
    """
    try:
        fd = os.open(base, FILE_FLAGS, dir_fd=store)
    except OSError as error:
        if error.errno == ELOOP:  # a symbolic link
            return None
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _SMALL:
            return None
        text = os.read(fd, _SMALL)
        if len(text) != status.st_size:
            return None
        return text, bool(status.st_mode & stat.S_IXUSR)
    finally:
        os.close(fd)


def missing(queries: Queries, store: StoreDirectory) -> list[StorePath]:
    """Return the valid items that are not, or were not, in the store; blocks.

    What was added or collected meanwhile may be among them.

    :raises StoreError: the store cannot be read.
    """
    prefix = store.path + "/"
    try:
        there = {prefix + name for name in os.listdir(store.path)}
    except OSError as error:
        raise StoreError(f"cannot read the store: {error.strerror}") from error
    return [path for path in queries.all_valid_paths() if path not in there]


def lost(
    path: StorePath,
    referrers: Callable[[StorePath], Sequence[StorePath]],
    exists: Callable[[StorePath], bool],
) -> list[StorePath]:
    """Return PATH, which is not on disk, and which items go with it, referrers first.

    Those are the items that refer to PATH, directly or not, over others that are not on
    disk either.
    """
    order: list[StorePath] = []
    seen = {path}
    pending: list[tuple[StorePath, bool]] = [(path, False)]
    while pending:
        item, done = pending.pop()
        if done:
            order.append(item)
            continue
        pending.append((item, True))
        for referrer in referrers(item):
            if referrer not in seen and not exists(referrer):
                seen.add(referrer)
                pending.append((referrer, False))
    return order


def exists(path: StorePath) -> bool:
    """Whether anything is at PATH."""
    return os.path.lexists(path)
