"""What is done when the machine has stopped while a store was in use.

Nobody is served before.  See `store.durability` for why this is enough.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from guixd.formats.path import StorePath
from guixd.store.verify import Verification, lost, missing

if TYPE_CHECKING:
    from guixd.store.local import LocalStore


def is_needed(store: LocalStore) -> bool:
    """Whether `find_damaged` and `drop_damaged` must be done before STORE is used."""
    return store.durability is not None and store.durability.unsure_since is not None


def find_damaged(store: LocalStore, reading: Verification | None = None) -> list[StorePath]:
    """Return the valid items of STORE that have not come to the disk; for a thread.

    :param reading: how STORE is read; if that is stopped, the result is of no use.
    :raises StoreError: the database cannot be read.
    """
    since = None if store.durability is None else store.durability.unsure_since
    if since is None:
        return []
    queries = store.database.read_only_copy()
    try:
        gone = missing(queries, store.directory)
        found = queries.items_since(since)
    finally:
        queries.close()
    rows = [row for row in found if store.directory.has_child(row.path)]
    findings = (reading or Verification(store.directory.path)).check(rows)
    damaged = {finding.row.path for finding in findings if not finding.is_incomplete}
    # Such as what a collection has removed, if only that has come to the disk.
    return sorted(damaged.union(gone))


def drop_damaged(store: LocalStore, damaged: Collection[StorePath]) -> list[StorePath]:
    """Make the items DAMAGED invalid, and all that refer to them; the others are all right.

    :return: what is not valid any more.
    :raises Busy: another process writes; try it again.
    """
    dropped: dict[StorePath, None] = {}
    for path in damaged:
        if store.is_valid(path):
            for item in lost(path, store.database.referrers, lambda referrer: False):
                store.invalidate(item)
                dropped[item] = None
    if store.durability is not None:
        store.durability.trust()
    return list(dropped)
