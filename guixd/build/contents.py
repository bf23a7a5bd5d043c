"""Looking into what lies in the store."""

from __future__ import annotations

from guixd.build.job import Interest
from guixd.build.threads import Threads, to_the_end
from guixd.errors import StoreError
from guixd.formats.derivation import Derivation
from guixd.formats.path import StorePath
from guixd.store.local import LocalStore
from guixd.store.trees import hash_and_scan


async def read_derivation(threads: Threads, store: LocalStore, path: StorePath) -> Derivation:
    """Return the valid derivation PATH, read in a thread if that may take long.

    :raises PathNotValid: it is not valid.
    :raises BadDerivation: it is no derivation.
    :raises StoreError: it cannot be read.
    """
    if store.takes_long_to_read(path):
        return await threads(store.load_derivation, path)
    return store.read_derivation(path)


async def is_intact(threads: Threads, path: StorePath, nar_hash: bytes) -> bool:
    """Whether the files of the item PATH have the sha256 NAR_HASH of its NAR."""
    interest = Interest()

    def compare() -> bool:
        try:
            return hash_and_scan(None, path, check=interest.check).digest == nar_hash
        except StoreError:
            return False

    return await to_the_end(threads(compare), interest.lose)
