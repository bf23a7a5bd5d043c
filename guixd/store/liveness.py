"""What of the store is alive: reachable from roots, in one state of the database (spec: gc §2)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from guixd.formats.path import StorePath
from guixd.store.queries import Queries, storable

_AT_ONCE = 2000
"""Rows that are fetched at a time; between them, other threads have their turn."""
_DERIVERS = (
    "UNION SELECT drv.id FROM alive"
    " JOIN ValidPaths AS output ON output.id = alive.id"
    " JOIN ValidPaths AS drv ON drv.path = output.deriver"
    " JOIN DerivationOutputs AS o ON o.drv = drv.id AND o.path = output.path"
)
_OUTPUTS = (
    "UNION SELECT output.id FROM alive"
    " JOIN DerivationOutputs AS o ON o.drv = alive.id"
    " JOIN ValidPaths AS output ON output.path = o.path"
)


@dataclass(frozen=True, slots=True)
class DeadItem:
    """A valid item that nothing needs."""

    row: int
    """Its number in the database."""
    path: StorePath
    size: int
    """Of its archive, in bytes; 0 if unknown."""


@dataclass(frozen=True, slots=True)
class Marked:
    """The valid items in one state of the database, by whether they are needed."""

    alive: frozenset[StorePath]
    dead: dict[int, DeadItem]
    referrers: dict[int, list[int]]
    """For dead items, those that refer to them; they are dead, too."""

    def referrers_first(self, rows: Iterable[int]) -> Iterator[DeadItem]:
        """Give the dead items ROWS and all that refers to them, each after what refers to it.

        Whoever takes them in this order never leaves an item without what it needs.
        """
        done: set[int] = set()
        for first in rows:
            pending = [first]
            while pending:
                row = pending[-1]
                if row in done:
                    pending.pop()
                    continue
                missing = [other for other in self.referrers.get(row, ()) if other not in done]
                if missing:
                    pending += missing
                    continue
                done.add(row)
                pending.pop()
                yield self.dead[row]


class Liveness(Queries):
    """A connection that computes what is alive; its methods may take long, for a thread.

    The work is done by SQLite, which lets other threads run meanwhile.
    """

    def mark(
        self, roots: Iterable[StorePath], *, keep_outputs: bool, keep_derivations: bool
    ) -> Marked:
        """Tell what the valid items among ROOTS need, and what nothing needs.

        :param keep_outputs: whether a live derivation keeps its outputs alive.
        :param keep_derivations: whether a live output keeps the derivation alive that is
            recorded as its deriver.
        """
        statement = (
            "CREATE TEMP TABLE reached AS WITH RECURSIVE alive (id) AS ("
            " SELECT v.id FROM json_each(?) AS root"
            " CROSS JOIN ValidPaths AS v ON v.path = root.value"
            " UNION SELECT Refs.reference FROM alive JOIN Refs ON Refs.referrer = alive.id"
            f" {_DERIVERS if keep_derivations else ''} {_OUTPUTS if keep_outputs else ''}"
            ") SELECT id FROM alive"
        )
        self._rows("PRAGMA temp_store = MEMORY")
        self._rows("BEGIN")
        try:
            wanted = json.dumps(sorted({path for path in roots if storable(path)}))
            self._rows(statement, wanted)
            self._rows("CREATE UNIQUE INDEX temp.ReachedId ON reached (id)")
            alive = frozenset(
                StorePath(path)
                for (path,) in self._slices(
                    "SELECT v.path FROM reached CROSS JOIN ValidPaths AS v ON v.id = reached.id"
                )
            )
            dead = {
                row: DeadItem(row, StorePath(path), size or 0)
                for row, path, size in self._slices(
                    "SELECT id, path, narSize FROM ValidPaths"
                    " WHERE id NOT IN (SELECT id FROM reached)"
                )
            }
            referrers: dict[int, list[int]] = {}
            for reference, referrer in self._slices(
                "SELECT reference, referrer FROM Refs"
                " WHERE referrer <> reference AND reference NOT IN (SELECT id FROM reached)"
            ):
                referrers.setdefault(reference, []).append(referrer)
        finally:
            self._rows("ROLLBACK")
        return Marked(alive, dead, referrers)

    def _slices(self, statement: str) -> Iterator[Any]:
        return self._each(statement, _AT_ONCE)
