"""Makes and opens the SQLite file that all daemons of a store share (spec: store §7, §8)."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from guixd.errors import Busy, StoreError

VERSION = 7
BUSY_TIMEOUT = 0.005
"""Seconds that a statement waits for a foreign process, at most, before `Busy`."""
_CHECKPOINT_PAGES = 40_000
_CACHE_KIB = 32 << 10

# Columns, constraints and names are those that other daemons and tools rely on.
_TABLES = (
    """CREATE TABLE IF NOT EXISTS ValidPaths (
        id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL,
        path TEXT UNIQUE NOT NULL,
        hash TEXT NOT NULL,
        registrationTime INTEGER NOT NULL,
        deriver TEXT,
        narSize INTEGER
    )""",
    """CREATE TABLE IF NOT EXISTS Refs (
        referrer INTEGER NOT NULL,
        reference INTEGER NOT NULL,
        PRIMARY KEY (referrer, reference),
        FOREIGN KEY (referrer) REFERENCES ValidPaths (id) ON DELETE CASCADE,
        FOREIGN KEY (reference) REFERENCES ValidPaths (id) ON DELETE RESTRICT
    )""",
    "CREATE INDEX IF NOT EXISTS IndexReferrer ON Refs (referrer)",
    "CREATE INDEX IF NOT EXISTS IndexReference ON Refs (reference)",
    # RESTRICT looks at rows one by one, so a reference to itself must go first.
    """CREATE TRIGGER IF NOT EXISTS DeleteSelfRefs BEFORE DELETE ON ValidPaths
        BEGIN
            DELETE FROM Refs WHERE referrer = old.id AND reference = old.id;
        END""",
    """CREATE TABLE IF NOT EXISTS DerivationOutputs (
        drv INTEGER NOT NULL,
        id TEXT NOT NULL,
        path TEXT NOT NULL,
        PRIMARY KEY (drv, id),
        FOREIGN KEY (drv) REFERENCES ValidPaths (id) ON DELETE CASCADE
    )""",
    "CREATE INDEX IF NOT EXISTS IndexDerivationOutputs ON DerivationOutputs (path)",
    """CREATE TABLE IF NOT EXISTS FailedPaths (
        path TEXT PRIMARY KEY NOT NULL,
        time INTEGER NOT NULL
    )""",
)


def store_error(error: sqlite3.Error) -> StoreError:
    """Return what to raise for an ERROR of SQLite: `Busy` or `StoreError`."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        return Busy("the database of the store is locked by another process")
    if code == sqlite3.SQLITE_READONLY:
        return StoreError("the store cannot be changed: its database is read-only for this daemon")
    if code == sqlite3.SQLITE_FULL:
        return StoreError(
            "the disk with the database of the store is full; `guix gc' frees space in the store"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreError(f"the database of the store is damaged: {error}")
    return StoreError(f"database of the store: {error}")


@contextmanager
def sqlite_errors() -> Iterator[None]:
    """Turn the errors of SQLite into `Busy` and `StoreError`."""
    try:
        yield
    except sqlite3.Error as error:
        raise store_error(error) from error


def database_file(directory: str) -> str:
    """Return the name of the database in DIRECTORY."""
    return directory + "/db.sqlite"


def prepare(directory: str) -> None:
    """Make the database in DIRECTORY if there is none, and test its version.

    :raises StoreError: a schema that is unknown or corrupt, or the file is missing.
    """
    version = _read_version(directory)
    if version == 0:
        _create(directory)
    elif version != VERSION:
        age = "newer" if version > VERSION else "older"
        raise StoreError(
            f"the store has schema {version}, which is {age} than schema {VERSION},"
            " the only one that this daemon knows"
        )
    elif not os.path.exists(database_file(directory)):
        raise StoreError(f"the database '{database_file(directory)}' is missing")


def _read_version(directory: str) -> int:
    name = directory + "/schema"
    try:
        with Path(name).open("rb") as file:
            text = file.read(100)
    except FileNotFoundError:
        return 0
    if not re.fullmatch(rb"-?[0-9]{1,9}", text):
        raise StoreError(f"'{name}' is corrupt")
    return int(text)


def _create(directory: str) -> None:
    descriptor = os.open(database_file(directory), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.fchmod(descriptor, 0o644)
    finally:
        os.close(descriptor)
    with sqlite_errors():
        connection = connect(directory)
        try:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _TABLES:
                connection.execute(statement)
            connection.execute("COMMIT")
        finally:
            connection.close()
    # Written last: it says that the rest is complete.
    name = directory + "/schema"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.fchmod(descriptor, 0o644)
        os.write(descriptor, str(VERSION).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def connect(directory: str, *, read_only: bool = False) -> sqlite3.Connection:
    """Open the database in DIRECTORY with the settings that all daemons use.

    The connection commits each statement by itself unless BEGIN is executed.  It may
    be used in any thread, but only in one at a time.
    """
    mode = "ro" if read_only else "rw"
    connection = sqlite3.connect(
        f"file:{quote(database_file(directory))}?mode={mode}",
        uri=True,
        timeout=BUSY_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=64,
    )
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        if not read_only:
            connection.execute("PRAGMA synchronous = NORMAL")
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    except BaseException:
        connection.close()
        raise
    return connection
