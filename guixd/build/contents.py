"""Whether what lies in the store is what was registered."""

from __future__ import annotations

from guixd.errors import StoreError
from guixd.formats.path import StorePath
from guixd.store.trees import hash_and_scan


def is_intact(path: StorePath, nar_hash: bytes) -> bool:
    """Whether the files of the item PATH have the sha256 NAR_HASH of its NAR; blocks."""
    try:
        return hash_and_scan(None, path).digest == nar_hash
    except StoreError:
        return False
