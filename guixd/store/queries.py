"""Everything that is asked of the database (spec: store §8, protocol §5)."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any

from guixd.errors import BadHash, PathNotValid, StoreError
from guixd.formats.path import HASH_LENGTH, StoreDirectory, StorePath
from guixd.store.changes import ClosedMark, find_mark
from guixd.store.items import PathInfo, Row
from guixd.store.schema import connect, database_file, sqlite_errors, store_error

_HASH_PREFIX = "sha256:"


def hash_text(digest: bytes) -> str:
    """Write the sha256 DIGEST of a NAR as the database has it."""
    return _HASH_PREFIX + digest.hex()


def storable(path: str) -> bool:
    """Whether PATH is UTF-8; nothing else is ever in the database."""
    return path.isascii() or not any("\ud800" <= character <= "\udfff" for character in path)


class Queries:
    """A connection to the database, for reading.

    Each call sees one state of the database.  All methods raise `StoreError`, or
    `Busy` if another process prevents reading for more than a moment.

    :param directory: the directory of the database.
    """

    def __init__(self, directory: str, store: StoreDirectory, *, read_only: bool = True) -> None:
        self.directory = directory
        self.store = store
        with sqlite_errors():
            self._connection = connect(directory, read_only=read_only)
            self._rows("SELECT count(*) FROM (SELECT 1 FROM ValidPaths LIMIT 1)")
            self._mark = find_mark(self._connection, database_file(directory))

    def close(self) -> None:
        """Close the connection."""
        self._mark = ClosedMark()
        with sqlite_errors():
            self._connection.close()

    def is_valid(self, path: str) -> bool:
        """Whether PATH is a valid item."""
        return self._id(path) is not None

    def valid_paths(self, paths: Iterable[StorePath]) -> set[StorePath]:
        """Return those of PATHS that are valid."""
        return set(self._valid_rows(paths))

    def _valid_rows(self, paths: Iterable[StorePath]) -> dict[StorePath, int]:
        # In the order of the index, so that its pages are read one after the other;
        # numbers come back, which costs less than as many names.
        wanted = sorted({path for path in paths if storable(path)})
        rows = self._rows(
            "SELECT wanted.key, v.id FROM json_each(?) AS wanted"
            " CROSS JOIN ValidPaths AS v ON v.path = wanted.value",
            json.dumps(wanted),
        )
        return {wanted[index]: row for index, row in rows}

    def all_valid_paths(self) -> list[StorePath]:
        """Return all valid items, sorted by bytes; for a thread, as it may be long."""
        rows = self._rows("SELECT path FROM ValidPaths ORDER BY path")
        return [StorePath(path) for (path,) in rows]

    def items_after(self, path: str, limit: int, smallest: int = 0) -> list[Row]:
        """Return the valid items that follow PATH in the order of bytes, at most LIMIT.

        :param smallest: bytes of the smallest archives that are of interest; those whose
            size is unknown always are.
        """
        rows = self._rows(
            "SELECT path, hash, narSize FROM ValidPaths WHERE path > CAST(? AS TEXT)"
            " AND (coalesce(narSize, 0) = 0 OR narSize >= ?) ORDER BY path LIMIT ?",
            path.encode("utf-8", "surrogateescape"),
            smallest,
            limit,
        )
        return [Row(StorePath(found), hash_, size or 0) for found, hash_, size in rows]

    def items_since(self, number: int) -> list[Row]:
        """Return the items behind the row NUMBER that were registered last, in their order.

        :return: those of the last hour in which anything was registered.
        """
        rows = self._rows(
            "SELECT path, hash, narSize FROM ValidPaths WHERE id > ? AND registrationTime >="
            " (SELECT max(registrationTime) FROM ValidPaths) - 3600 ORDER BY id",
            number,
        )
        return [Row(StorePath(path), hash_, size or 0) for path, hash_, size in rows]

    def state(self) -> tuple[bytes, int]:
        """Return something that differs after each commit, of whoever."""
        return self._mark.raw, self._connection.total_changes

    def last_row(self) -> int:
        """Return the number of the last row of a valid item, 0 if there is none."""
        ((number,),) = self._rows("SELECT coalesce(max(id), 0) FROM ValidPaths")
        return int(number)

    def find_row(self, path: StorePath) -> Row | None:
        """Return PATH as the database has it, `None` if it is not valid."""
        rows = self._rows(
            "SELECT hash, narSize FROM ValidPaths WHERE path = CAST(? AS TEXT)",
            path.encode("utf-8", "surrogateescape"),
        )
        return Row(path, rows[0][0], rows[0][1] or 0) if rows else None

    def path_info(self, path: StorePath) -> PathInfo:
        """Return what is known of PATH.

        :raises PathNotValid: PATH is not valid.
        """
        info = self.find_path_info(path)
        if info is None:
            raise PathNotValid(f"path '{path}' is not valid")
        return info

    def find_path_info(self, path: StorePath) -> PathInfo | None:
        """Return what is known of PATH, `None` if it is not valid."""
        if not storable(path):
            return None
        # One statement, so that item and references are of the same state.
        rows = self._rows(
            "SELECT v.hash, v.registrationTime, v.deriver, v.narSize, r.path FROM ValidPaths AS v"
            " LEFT JOIN Refs ON Refs.referrer = v.id"
            " LEFT JOIN ValidPaths AS r ON r.id = Refs.reference"
            " WHERE v.path = ? ORDER BY r.path",
            str(path),
        )
        if not rows:
            return None
        hash_, time, deriver, size, _ = rows[0]
        return PathInfo(
            path,
            _digest(path, hash_),
            size or 0,
            tuple([StorePath(row[4]) for row in rows if row[4] is not None]),
            time,
            StorePath(deriver) if deriver else None,
        )

    def referrers(self, path: StorePath) -> list[StorePath]:
        """Return the valid items that refer to PATH, sorted; none if it is not valid."""
        return self._paths(
            path,
            "SELECT r.path FROM ValidPaths AS v JOIN Refs ON Refs.reference = v.id"
            " JOIN ValidPaths AS r ON r.id = Refs.referrer WHERE v.path = ? ORDER BY r.path",
        )

    def valid_derivers(self, path: StorePath) -> list[StorePath]:
        """Return the valid derivations that have PATH, valid or not, as an output, sorted."""
        return self._paths(
            path,
            "SELECT DISTINCT v.path FROM DerivationOutputs AS o JOIN ValidPaths AS v"
            " ON v.id = o.drv WHERE o.path = ? ORDER BY v.path",
        )

    def derivation_outputs(self, drv: StorePath) -> dict[str, StorePath]:
        """Return the outputs of the valid item DRV by name, sorted; none if no derivation.

        :raises PathNotValid: DRV is not valid.
        """
        identifier = self._id(drv)
        if identifier is None:
            raise PathNotValid(f"path '{drv}' is not valid")
        rows = self._rows(
            "SELECT id, path FROM DerivationOutputs WHERE drv = ? ORDER BY id", identifier
        )
        return {name: StorePath(path) for name, path in rows}

    def path_from_hash_part(self, part: str) -> StorePath | None:
        """Return the valid item whose base name begins with PART, of 32 bytes.

        :raises BadHash: PART has another length.
        """
        if len(part.encode("utf-8", "surrogateescape")) != HASH_LENGTH:
            raise BadHash(f"'{part}' is not the hash part of a store path")
        prefix = f"{self.store.path}/{part}"
        if not storable(prefix):
            return None
        rows = self._rows(
            "SELECT path FROM ValidPaths WHERE path >= ? ORDER BY path LIMIT 1", prefix
        )
        return StorePath(rows[0][0]) if rows and rows[0][0].startswith(prefix) else None

    def closure(self, paths: Iterable[StorePath]) -> AbstractSet[StorePath]:
        """Return PATHS and all that they refer to, directly or not.

        :raises PathNotValid: one of PATHS is not valid.
        """
        wanted = sorted(set(paths))
        if not wanted:
            return set()
        rows = self._rows(
            "WITH RECURSIVE reached (id) AS ("
            " SELECT v.id FROM json_each(?) AS wanted"
            " CROSS JOIN ValidPaths AS v ON v.path = wanted.value"
            " UNION SELECT Refs.reference FROM reached JOIN Refs ON Refs.referrer = reached.id"
            ") SELECT v.path FROM reached CROSS JOIN ValidPaths AS v ON v.id = reached.id",
            json.dumps([path for path in wanted if storable(path)]),
        )
        found = {StorePath(path) for (path,) in rows}
        for path in wanted:
            if path not in found:
                raise PathNotValid(f"path '{path}' is not valid")
        return found

    def failed_paths(self) -> list[StorePath]:
        """Return the outputs whose builds failed for good, sorted (§15)."""
        rows = self._rows("SELECT path FROM FailedPaths ORDER BY path")
        return [StorePath(path) for (path,) in rows]

    def has_failed(self, path: StorePath) -> bool:
        """Whether PATH is among the failed paths."""
        return bool(self._paths(path, "SELECT path FROM FailedPaths WHERE path = ?"))

    def _id(self, path: str) -> int | None:
        if not storable(path):
            return None
        rows = self._rows("SELECT id FROM ValidPaths WHERE path = ?", str(path))
        return rows[0][0] if rows else None

    def _paths(self, path: StorePath, statement: str) -> list[StorePath]:
        if not storable(path):
            return []
        return [StorePath(found) for (found,) in self._rows(statement, str(path))]

    def _each(self, statement: str, at_once: int) -> Iterator[Any]:
        """Give the rows of a long answer, AT_ONCE of which are fetched at a time."""
        try:
            cursor = self._connection.execute(statement)
            while rows := cursor.fetchmany(at_once):
                yield from rows
        except sqlite3.Error as error:
            raise store_error(error) from error

    def _rows(self, statement: str, *parameters: object) -> list[Any]:
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            if "decode to UTF-8" not in str(error) or self._connection.text_factory is _any_text:
                raise store_error(error) from error
        # Somebody else has put such bytes there.  Other texts are read faster without this.
        self._connection.text_factory = _any_text
        return self._rows(statement, *parameters)


def _any_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _digest(path: StorePath, text: str) -> bytes:
    try:
        digest = bytes.fromhex(text.removeprefix(_HASH_PREFIX))
    except ValueError:
        digest = b""
    if len(digest) != 32 or not text.startswith(_HASH_PREFIX):
        raise StoreError(f"the database has a malformed hash '{text}' for '{path}'")
    return digest
