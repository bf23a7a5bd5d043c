"""All valid items in the order of their names, some at a time."""

from __future__ import annotations

from collections import deque

from guixd.store.items import Row
from guixd.store.queries import Queries

_READ_AT_ONCE = 512
_MOST_ITEMS = 256
_MOST_BYTES = 8 << 20


class Survey:
    """Goes through the valid items in small steps, in constant memory.

    What becomes valid meanwhile may be left out, and what is told to be valid may not be
    so any more.

    :param smallest: bytes of the smallest archives that are of interest.
    """

    def __init__(self, queries: Queries, smallest: int = 0) -> None:
        self._queries = queries
        self._smallest = smallest
        self._rows: deque[Row] = deque()
        self._last = ""
        self._read = True

    def take(self) -> list[Row]:
        """Return the next items, so many that their files are a good piece of work.

        :return: nothing at the end.
        :raises StoreError: as all queries.
        """
        rows = self._rows
        taken: list[Row] = []
        size = 0
        while len(taken) < _MOST_ITEMS and size < _MOST_BYTES:
            if not rows and self._read:
                found = self._queries.items_after(self._last, _READ_AT_ONCE, self._smallest)
                self._read = len(found) == _READ_AT_ONCE
                rows.extend(found)
                self._last = rows[-1].path if rows else ""
            if not rows:
                break
            row = rows.popleft()
            taken.append(row)
            size += row.nar_size
        return taken
