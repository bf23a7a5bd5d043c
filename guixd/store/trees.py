"""Files and trees, reached by directory descriptors only: what others import.

All take `(dir_fd, name)`; with None for the descriptor, NAME is a file name
whose directories can be trusted.  All block, some for long.
"""

from __future__ import annotations

from guixd.store.beneath import open_beneath
from guixd.store.canonical import (
    STORE_TIME,
    InodesSeen,
    canonicalise,
    check_output,
    chown_tree,
    strip,
)
from guixd.store.copying import copy_fresh
from guixd.store.dump import Measured, dump, dump_path, hash_and_scan, hash_file, hash_nar
from guixd.store.removal import remove, remove_path, remove_small
from guixd.store.restore import TreeWriter

__all__ = [
    "STORE_TIME",
    "InodesSeen",
    "Measured",
    "TreeWriter",
    "canonicalise",
    "check_output",
    "chown_tree",
    "copy_fresh",
    "dump",
    "dump_path",
    "hash_and_scan",
    "hash_file",
    "hash_nar",
    "open_beneath",
    "remove",
    "remove_path",
    "remove_small",
    "strip",
]
