"""The one writer of the database, with what it knows already in memory (spec: store §8)."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import compress
from typing import TypeVar

from guixd.errors import BadName, PathNotValid, ReferencesCycle, StoreError
from guixd.faults import reached
from guixd.formats.derivation import Derivation
from guixd.formats.path import StoreDirectory, StorePath
from guixd.store.durability import flush
from guixd.store.items import PathInfo, Registration
from guixd.store.liveness import DeadItem
from guixd.store.queries import Queries, hash_text, storable
from guixd.store.schema import prepare, store_error

_T = TypeVar("_T")
_MAXIMUM_KNOWN = 1 << 16
_MAXIMUM_INFOS = 1 << 14
_MAXIMUM_IN_CLOSURES = 1 << 15
_LONGEST_KNOWN = 1024  # longer ones can hardly be valid, and clients may ask for many
_CHECKPOINT_PAGES = 4000


class Database(Queries):
    """The database, read and written in one thread.

    Answers are kept in memory as long as no other process commits anything.  Nothing
    waits for another process longer than `schema.BUSY_TIMEOUT`; after that `Busy` is
    raised and the caller should try again later.

    :param directory: the directory of the database, which is made there if missing.
    :param clock: gives the time of registration, in seconds since the epoch.
    :param read_only: whether changes are errors, since the file cannot be written to.
    :param durable: whether `checkpoint` flushes the files of the items, too.
    :raises StoreError: the schema is not the one known.
    """

    def __init__(
        self,
        directory: str,
        store: StoreDirectory,
        *,
        clock: Callable[[], float] = time.time,
        durable: bool = False,
        read_only: bool = False,
    ) -> None:
        prepare(directory)
        super().__init__(directory, store, read_only=read_only)
        self._durable = durable
        self._clock = clock
        self._writer = self._connection.cursor()
        self._seen = self._mark.raw
        self._copied_pages = 0
        self._known: dict[str, int] = {}  # row numbers; 0 for what is not valid
        self._infos: dict[str, PathInfo] = {}
        self._closures: dict[frozenset[StorePath], frozenset[StorePath]] = {}
        self._closure_room = _MAXIMUM_IN_CLOSURES

    def read_only_copy(self) -> Queries:
        """Open another connection, to read in a thread; the caller closes it there."""
        return Queries(self.directory, self.store)

    def checkpoint_due(self) -> bool:
        """Whether the write-ahead log has grown so much that `checkpoint` is worth it."""
        pages = self._mark.log_pages
        self._copied_pages = min(self._copied_pages, pages)  # the log has begun anew
        return pages - self._copied_pages >= _CHECKPOINT_PAGES

    def checkpoint(self) -> Callable[[], None]:
        """Return a function that copies the write-ahead log into the database.

        It is for a thread: it may take long, and nobody waits for it meanwhile.  Left
        undone, SQLite does it by itself in some commit, when the log is very long.
        """
        directory, store, durable = self.directory, self.store, self._durable
        self._copied_pages = self._mark.log_pages

        def run() -> None:
            if durable:
                flush(directory, store)
            queries = Queries(directory, store, read_only=False)
            try:
                queries._rows("PRAGMA wal_checkpoint(PASSIVE)")
            finally:
                queries.close()

        return run

    # --- reading, from memory if possible -----------------------------------

    def is_valid(self, path: str) -> bool:
        """Whether PATH is a valid item."""
        if self._mark.raw != self._seen:
            self._forget()
        row = self._known.get(path)
        return (self._row(path) if row is None else row) > 0

    def is_known_valid(self, path: str) -> bool:
        """Whether PATH is known to be valid without asking the database itself."""
        if self._mark.raw != self._seen:
            self._forget()
        return self._known.get(path, 0) > 0

    def valid_paths(self, paths: Iterable[StorePath]) -> set[StorePath]:
        """Return those of PATHS that are valid."""
        if self._mark.raw != self._seen:
            self._forget()
        wanted = set(paths)
        known = self._known
        unknown = wanted.difference(known)
        found = {path for path in wanted - unknown if known[path]}
        if unknown:
            rows = self._valid_rows(unknown)
            if len(known) + len(unknown) > _MAXIMUM_KNOWN:
                known.clear()
            if len(unknown) <= _MAXIMUM_KNOWN:
                known.update({path: 0 for path in unknown if len(path) <= _LONGEST_KNOWN})
                known.update(rows.items())
            found.update(rows)
        return found

    def valid_in_order(self, paths: Sequence[StorePath]) -> list[StorePath]:
        """Return those of PATHS that are valid, in their order."""
        if self._mark.raw != self._seen:
            self._forget()
        rows = list(map(self._known.get, paths))
        if None not in rows:
            return list(compress(paths, rows))
        valid = self.valid_paths(paths)
        return [path for path in paths if path in valid]

    def find_path_info(self, path: StorePath) -> PathInfo | None:
        """Return what is known of PATH, `None` if it is not valid."""
        if self._mark.raw != self._seen:
            self._forget()
        info = self._infos.get(path)
        if info is not None:
            return info
        if self._known.get(path) == 0:
            return None
        info = super().find_path_info(path)
        if info is not None:
            self._remember(info)
        return info

    def closure(self, paths: Iterable[StorePath]) -> frozenset[StorePath]:
        """Return PATHS and all that they refer to, directly or not.

        :raises PathNotValid: one of PATHS is not valid.
        """
        if self._mark.raw != self._seen:
            self._forget()
        wanted = frozenset(paths)
        found = self._closures.get(wanted)
        if found is None:
            found = frozenset(super().closure(wanted))
            if len(found) <= _MAXIMUM_IN_CLOSURES:
                if len(found) > self._closure_room:
                    self._forget_closures()
                self._closure_room -= len(found)
                self._closures[wanted] = found
        return found

    def _forget(self) -> None:
        self._seen = self._mark.raw
        self._known.clear()
        self._infos.clear()
        self._forget_closures()

    def _forget_closures(self) -> None:
        self._closures.clear()
        self._closure_room = _MAXIMUM_IN_CLOSURES

    def _row(self, path: str) -> int:
        """Return the row number of PATH, 0 if it is not valid."""
        row = self._known.get(path)
        if row is None:
            row = self._id(path) or 0
            self._know(path, row)
        return row

    def _know(self, path: str, row: int) -> None:
        if len(path) > _LONGEST_KNOWN:
            return
        if len(self._known) >= _MAXIMUM_KNOWN:
            self._known.clear()
        self._known[path] = row

    def _remember(self, info: PathInfo) -> None:
        if len(self._infos) >= _MAXIMUM_INFOS:
            self._infos.clear()
        self._infos[info.path] = info

    # --- writing --------------------------------------------------------------

    def _write(self, work: Callable[[], _T]) -> _T:
        """Do WORK in a transaction; what is remembered is true inside it."""
        execute = self._writer.execute
        try:
            execute("BEGIN IMMEDIATE")
            try:
                before = self._look()
                result = work()
                reached("database.written")
                execute("COMMIT")
                reached("database.committed")
            except BaseException:
                if self._connection.in_transaction:
                    execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise store_error(error) from error
        self._committed(before)
        return result

    def _look(self) -> bytes:
        """Forget what may have changed; return the mark of the present state."""
        mark = self._mark.raw
        if mark != self._seen:
            self._forget()
        return mark

    def _committed(self, before: bytes) -> None:
        """Go on remembering, unless others have changed something since BEFORE."""
        after = self._mark.raw
        if self._mark.only_mine(before, after):
            self._seen = after

    def add(self, item: Registration, derivation: Derivation | None = None) -> None:
        """Make ITEM valid, whose files are in place; nothing happens if it is valid.

        :param derivation: the checked contents if it ends in `.drv`.
        :raises PathNotValid: something that is referred to is not valid.
        """
        path = item.path
        if not path.isascii() and not storable(path):
            raise BadName(f"'{path}' is not UTF-8")
        now = int(self._clock())
        if item.references or derivation is not None:
            row = self._write(lambda: self._add(item, derivation, now))
        else:
            # One statement needs no BEGIN and COMMIT, which take a fifth of the time.
            before = self._look()
            try:
                row = self._insert(item, now)
                reached("database.inserted")
            except sqlite3.Error as error:
                raise store_error(error) from error
            self._committed(before)
        if row:
            self._know(path, row)
        else:
            self._known.pop(path, None)

    def _add(self, item: Registration, derivation: Derivation | None, now: int) -> int:
        row = self._insert(item, now)
        if row and derivation is not None:
            self._record_outputs(row, derivation)
        if row and item.references:
            self._record_references(row, item.references, {item.path: row})
        return row

    def register(
        self,
        items: Collection[Registration],
        derivations: Mapping[StorePath, Derivation] | None = None,
    ) -> None:
        """Make ITEMS valid, all or none (§8).

        Of an item that is valid already, hash and size are replaced and references
        are added to.

        :param derivations: the checked contents of all those items that end in `.drv`.
        :raises PathNotValid: something that is referred to is not valid.
        :raises ReferencesCycle: items refer to each other in a circle.
        """
        now = int(self._clock())
        derivations = derivations or {}
        for item in items:
            if not storable(item.path):
                raise BadName(f"'{item.path}' is not UTF-8")
            if item.path.is_derivation and item.path not in derivations:
                raise StoreError(f"the contents of '{item.path}' are not known")
        _check_order(items)
        rows: dict[str, int] = {}
        fresh: list[Registration] = []
        self._write(lambda: self._register(items, derivations, now, rows, fresh))
        for path, row in rows.items():
            self._know(path, row)
            self._infos.pop(path, None)
        if len(fresh) < len(items):  # only new items are in no closure yet
            self._forget_closures()
        for item in fresh:
            references = tuple(sorted(item.references))
            self._remember(
                PathInfo(item.path, item.nar_hash, item.nar_size, references, now, item.deriver)
            )

    def _register(
        self,
        items: Collection[Registration],
        derivations: Mapping[StorePath, Derivation],
        now: int,
        rows: dict[str, int],
        fresh: list[Registration],
    ) -> None:
        for item in items:
            row = rows.get(item.path) or self._row(item.path)
            if row:
                self._writer.execute(
                    "UPDATE ValidPaths SET hash = ?, narSize = ? WHERE id = ?",
                    (hash_text(item.nar_hash), item.nar_size or None, row),
                )
            else:
                row = self._insert(item, now)
                fresh.append(item)
            rows[item.path] = row
            if item.path.is_derivation:
                self._record_outputs(row, derivations[item.path])
        for item in items:
            if item.references:
                self._record_references(rows[item.path], item.references, rows)
        if len(fresh) < len(items) > 1:
            self._check_recorded_order(rows)

    def _insert(self, item: Registration, now: int) -> int:
        """Return the number of the new row, 0 if ITEM has one already."""
        writer = self._writer
        writer.execute(
            "INSERT OR IGNORE INTO ValidPaths (path, hash, registrationTime, deriver, narSize)"
            " VALUES (?, ?, ?, ?, ?)",
            (
                str(item.path),
                hash_text(item.nar_hash),
                now,
                None if item.deriver is None else str(item.deriver),
                item.nar_size or None,
            ),
        )
        return (writer.lastrowid or 0) if writer.rowcount else 0

    def _record_outputs(self, row: int, derivation: Derivation) -> None:
        outputs = derivation.outputs.items()
        self._writer.executemany(
            "INSERT OR REPLACE INTO DerivationOutputs (drv, id, path) VALUES (?, ?, ?)",
            [(row, name, str(output.path)) for name, output in outputs],
        )

    def _record_references(
        self, row: int, references: Iterable[StorePath], rows: Mapping[str, int]
    ) -> None:
        pairs = []
        for path in references:
            reference = rows.get(path) or self._row(path)
            if not reference:
                raise PathNotValid(f"path '{path}' is not valid")
            pairs.append((row, reference))
        self._writer.executemany(
            "INSERT OR REPLACE INTO Refs (referrer, reference) VALUES (?, ?)", pairs
        )

    def _check_recorded_order(self, ids: Mapping[str, int]) -> None:
        graph = {
            path: {
                reference
                for (reference,) in self._rows(
                    "SELECT v.path FROM Refs JOIN ValidPaths AS v ON v.id = Refs.reference"
                    " WHERE Refs.referrer = ? AND v.id <> Refs.referrer",
                    identifier,
                )
                if reference in ids
            }
            for path, identifier in ids.items()
        }
        _check_graph(graph)

    def invalidate(self, path: StorePath) -> None:
        """Make PATH invalid; its files stay.  Nothing happens if it is not valid.

        :raises StoreError: "in use by" another valid item.
        """
        self._write(lambda: self._invalidate(path))
        self._know(path, 0)
        self._infos.pop(path, None)
        self._forget_closures()

    def _invalidate(self, path: StorePath) -> None:
        for referrer in self.referrers(path):
            if referrer != path:
                raise StoreError(f"cannot invalidate '{path}' because it is in use by '{referrer}'")
        if storable(path):
            self._writer.execute("DELETE FROM ValidPaths WHERE path = ?", (str(path),))

    def invalidate_unused(self, items: Sequence[DeadItem]) -> list[DeadItem]:
        """Make those of ITEMS invalid to which no other valid item refers; files stay.

        :param items: as found in an earlier state, those that refer to others first.
        :return: what was made invalid.
        """
        gone = self._write(lambda: self._invalidate_unused(items))
        for item in gone:
            self._know(item.path, 0)
            self._infos.pop(item.path, None)
        self._forget_closures()
        return gone

    def _invalidate_unused(self, items: Sequence[DeadItem]) -> list[DeadItem]:
        gone = []
        for item in items:
            self._writer.execute(
                "DELETE FROM ValidPaths WHERE id = ? AND NOT EXISTS"
                " (SELECT 1 FROM Refs WHERE reference = ? AND referrer <> ?)",
                (item.row, item.row, item.row),
            )
            if self._writer.rowcount:
                gone.append(item)
        return gone

    def set_hash(self, path: StorePath, nar_hash: bytes, nar_size: int) -> None:
        """Replace hash and size of the valid item PATH.

        :raises PathNotValid: PATH is not valid.
        """

        def work() -> None:
            row = self._row(path)
            if not row:
                raise PathNotValid(f"path '{path}' is not valid")
            self._writer.execute(
                "UPDATE ValidPaths SET hash = ?, narSize = ? WHERE id = ?",
                (hash_text(nar_hash), nar_size or None, row),
            )

        self._write(work)
        self._infos.pop(path, None)

    def add_failed(self, paths: Iterable[StorePath]) -> None:
        """Remember that the builds of the outputs PATHS failed for good (§15)."""
        now = int(self._clock())
        statement = "INSERT OR IGNORE INTO FailedPaths (path, time) VALUES (?, ?)"
        entries = [(str(path), now) for path in paths]
        self._write(lambda: self._many(statement, entries))

    def clear_failed(self, words: Iterable[str]) -> None:
        """Forget failures: of a path, of the outputs of a derivation, or all (`*`)."""
        statement = (
            "DELETE FROM FailedPaths WHERE :word = '*' OR path = :word OR path IN"
            " (SELECT o.path FROM DerivationOutputs AS o JOIN ValidPaths AS v"
            " ON v.id = o.drv WHERE v.path = :word)"
        )
        entries = [{"word": str(word)} for word in words if storable(word)]
        self._write(lambda: self._many(statement, entries))

    def _many(self, statement: str, entries: Iterable[tuple[object, ...] | dict[str, str]]) -> None:
        self._writer.executemany(statement, entries)


def _check_order(items: Collection[Registration]) -> None:
    if len(items) > 1:
        paths = {item.path for item in items}
        _check_graph({item.path: (item.references & paths) - {item.path} for item in items})


def _check_graph(graph: Mapping[str, Collection[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise ReferencesCycle(f"cycle detected in the references of '{error.args[1][0]}'") from None
