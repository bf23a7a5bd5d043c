"""Names beside the items for what is not yet, or no longer, an item."""

from __future__ import annotations

import itertools
import os

from guixd.formats.path import StoreDirectory
from guixd.store.roots import TempRoots

_numbers = itertools.count(1)


class Staging:
    """The names of one store, which are protected from collectors and used again.

    :param roots: what protects them.
    """

    def __init__(self, store: StoreDirectory, roots: TempRoots) -> None:
        self._store = store
        self._roots = roots
        self._free: list[str] = []
        self._taken: set[str] = set()

    def take(self) -> str:
        """Return a name at which there is nothing; `free` gives it back.

        :raises Busy: another process collects.
        """
        if self._free:
            name = self._free.pop()
        else:
            name = self._store.child(unused_name(self._store.path))
            self._roots.add(name)
        self._taken.add(name)
        return name

    def free(self, name: str) -> None:
        """Say that there is nothing at NAME any more."""
        self._taken.discard(name)
        self._free.append(name)

    def has(self, name: str) -> bool:
        """Whether NAME is taken."""
        return name in self._taken


def unused_name(store: str) -> str:
    """Return a base name for something that is not yet, or no longer, an item."""
    while True:
        # A process that ended in between may have had our number.
        name = f"guixd-{os.getpid()}-{next(_numbers)}"
        if not os.path.lexists(f"{store}/{name}"):
            return name
