"""Tells cheaply whether the database has changed since it was last looked at.

In WAL mode SQLite keeps 48 bytes in shared memory that differ after each commit of any
process; it compares them itself whenever a read begins (source: sqlite.org/walformat.html,
§2.1).  Looking at these bytes where SQLite has mapped them costs a tenth of a
microsecond; asking `PRAGMA data_version`, which does the same, costs five.  A descriptor
of our own for that file must not be used: closing it would drop SQLite's locks.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import struct
from pathlib import Path
from typing import Protocol

_HEADER_SIZE = 48
_WAL_INDEX_VERSION = 3007000
_commits = struct.Struct("=8xI").unpack_from
_pages = struct.Struct("=16xI").unpack_from


class ChangeMark(Protocol):
    """Something whose `raw` differs after each commit."""

    @property
    def raw(self) -> bytes:
        """The present state of the database; equal states have equal contents."""

    def only_mine(self, before: bytes, after: bytes) -> bool:
        """Whether between two states, in the second of which one commit of this
        connection ended, nobody else has committed anything."""

    @property
    def log_pages(self) -> int:
        """How many pages the write-ahead log has; 0 if unknown."""


class MappedMark:
    """The header of the WAL index, where SQLite has mapped it.

    Only usable while a connection of this process to the database is open.
    """

    def __init__(self, address: int) -> None:
        self._header = (ctypes.c_char * _HEADER_SIZE).from_address(address)

    @property
    def raw(self) -> bytes:
        return self._header.raw

    def only_mine(self, before: bytes, after: bytes) -> bool:
        # The third word counts commits, also of those who are not us.
        commits: int = _commits(after)[0] - _commits(before)[0]
        return commits & 0xFFFFFFFF <= 1

    @property
    def log_pages(self) -> int:
        return int(_pages(self._header.raw)[0])


class PragmaMark:
    """The same by asking SQLite; commits of the connection itself do not count."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._cursor = connection.cursor()

    @property
    def raw(self) -> bytes:
        row = self._cursor.execute("PRAGMA data_version").fetchone()
        return struct.pack("=q", row[0])

    def only_mine(self, before: bytes, after: bytes) -> bool:
        return before == after

    @property
    def log_pages(self) -> int:
        return 0


class ClosedMark:
    """What stands for the mark of a closed database."""

    @property
    def raw(self) -> bytes:
        raise sqlite3.ProgrammingError("the database is closed")

    def only_mine(self, before: bytes, after: bytes) -> bool:
        return False

    @property
    def log_pages(self) -> int:
        return 0


def find_mark(connection: sqlite3.Connection, file: str) -> ChangeMark:
    """Return the best mark for the database FILE, which CONNECTION has read from."""
    address = _mapping(os.path.realpath(file) + "-shm")
    if address is not None:
        mark = MappedMark(address)
        if struct.unpack_from("=I", mark.raw)[0] == _WAL_INDEX_VERSION:
            return mark
    return PragmaMark(connection)


def _mapping(file: str) -> int | None:
    """Return where the beginning of FILE is mapped in this process."""
    try:
        with Path("/proc/self/maps").open(encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6 and fields[5] == file and int(fields[2], 16) == 0:
                    return int(fields[0].split("-")[0], 16)
    except OSError:
        pass
    return None
