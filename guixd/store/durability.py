"""What is valid is on disk, also after the power has failed (spec: store §7, §8).

Commits go to SQLite's log, and nobody waits for the files of the items or for the log to
be flushed, so that adding costs nothing.  The kernel may bring a commit to the disk before
the files.  So from time to time, in a thread, the file system of the store is flushed,
and a small file beside the database then tells up to which row the items have been, and
in which run of the machine.  If the machine has been started anew since, the items
behind that row are read before anybody is served, and those whose files have not come
through become invalid, as do all that are not there because a collection has come
through only by half: see `store.recovery`.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from guixd.errors import StoreError
from guixd.formats.path import StoreDirectory
from guixd.store.queries import Queries
from guixd.store.schema import database_file

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True, slots=True)
class Flushed:
    """How much is known to be on disk."""

    boot: str
    """The name of the run of the machine in which this was found."""
    row: int
    """The number of the last item in the database then, 0 for none."""
    closed: bool = False
    """Whether the store was closed then, in good order."""

    @property
    def is_of_this_run(self) -> bool:
        """Whether the machine has not been started anew since."""
        return self.boot == boot_id()


def boot_id() -> str:
    """Return a name for the present run of the machine; empty if unknown."""
    try:
        return Path(_BOOT_ID).read_text().strip()
    except OSError:
        return ""


def read_flushed(directory: str) -> Flushed | None:
    """Return what is known of the database in DIRECTORY; `None` if that is nothing."""
    try:
        boot, row, *closed = Path(directory, "flushed").read_text().split()
        return Flushed(boot, int(row), bool(closed))
    except (OSError, ValueError):
        return None


def write_flushed(directory: str, row: int, *, closed: bool = False) -> None:
    """Note that all items up to ROW of the database in DIRECTORY are on disk.

    :param closed: whether nobody of ours uses the store any more.
    Errors only mean that they are looked at again when the machine has stopped.
    """
    name = f"{directory}/flushed"
    try:
        Path(f"{name}-{os.getpid()}").write_text(f"{boot_id()} {row}{' closed' * closed}\n")
        os.replace(f"{name}-{os.getpid()}", name)
    except OSError:
        pass


def flush(directory: str, store: StoreDirectory) -> None:
    """Flush the files of all items that are valid now; blocks, maybe for long.

    :param directory: the directory of the database.
    :raises StoreError: something could not be written.
    """
    queries = Queries(directory, store)
    try:
        row = queries.last_row()
    finally:
        queries.close()
    sync_file_system(store.path)
    write_flushed(directory, row)


class Durability:
    """What is known to be on disk of the items of an open store.

    :ivar unsure_since: the row of the database after which all items must be looked at
        before anybody is served, since the machine has stopped; `None` if none need be.
    """

    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        self._noted: object = None  # the state of the database with which nothing need be flushed
        self.unsure_since: int | None = None
        flushed = read_flushed(queries.directory)
        if flushed is None or flushed.closed:
            self.trust()  # or it was not for us to flush
        elif not flushed.is_of_this_run:
            self.unsure_since = flushed.row

    def trust(self) -> None:
        """Note that what was valid when the machine stopped is all right."""
        self.unsure_since = None
        self._noted = self._queries.state()
        write_flushed(self._queries.directory, self._queries.last_row())

    def settle(self) -> None:
        """Flush all, for the end, if anything was committed, also a repair; blocks.

        :raises StoreError: something could not be written.
        """
        if self.unsure_since is None:
            row = self._queries.last_row()
            if self._queries.state() != self._noted:
                self.settle_all()
            write_flushed(self._queries.directory, row, closed=True)

    def settle_all(self) -> None:
        """Flush all items, and what was committed, for who wants that; blocks, for a thread.

        :raises StoreError: something could not be written.
        """
        sync_file_system(self._queries.store.path)
        sync_log(self._queries.directory)


def sync_file_system(directory: str) -> None:
    """Flush the file system that DIRECTORY lies on; blocks, maybe for long.

    :raises StoreError: something could not be written.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _libc().syncfs(ctypes.c_int(fd)):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            os.close(fd)
    except OSError as error:
        raise StoreError(f"cannot flush the disk of '{directory}': {error.strerror}") from error


def sync_log(directory: str) -> None:
    """Flush the log of the database in DIRECTORY: what was committed stays so; blocks.

    :raises StoreError: it could not be written.
    """
    try:
        # SQLite has no lock on this file that closing it could lose.
        fd = os.open(database_file(directory) + "-wal", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreError(f"cannot flush the log of the database: {error.strerror}") from error


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
