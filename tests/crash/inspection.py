"""What must be true of a store at any time, and what after a collection."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
from pathlib import Path

from guixd.client import nar_of_tree
from guixd.formats import derivation
from guixd.formats.path import StorePath
from guixd.settings import Directories
from tests.crash.items import Items


def problems(directories: Directories, items: Items) -> list[str]:
    """Return what is wrong with the database, and with the contents of all valid items."""
    connection = sqlite3.connect(f"file:{directories.database}/db.sqlite?mode=ro", uri=True)
    try:
        return _Inspection(connection, items).problems
    finally:
        connection.close()


class _Inspection:
    def __init__(self, connection: sqlite3.Connection, items: Items) -> None:
        self.problems: list[str] = []
        self._rows = connection.execute
        self._items = items
        connection.execute("BEGIN")  # one state of the database for all of it
        self._expect("integrity", self._rows("PRAGMA integrity_check").fetchall(), [("ok",)])
        self._expect("foreign keys", self._rows("PRAGMA foreign_key_check").fetchall(), [])
        for row in self._rows("SELECT id, path, hash, narSize FROM ValidPaths").fetchall():
            self._item(*row)

    def _expect(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            self.problems.append(f"{what}: {found!r} instead of {wanted!r}")

    def _item(self, row: int, name: str, nar_hash: str, nar_size: int) -> None:
        path = self._items.store.parse(name)
        expected = self._items.expected.get(path)
        if expected is None:
            self.problems.append(f"{path}: nobody makes it")
            return
        self._expect(f"{path}: hash", nar_hash, f"sha256:{expected.nar_hash}")
        self._expect(f"{path}: size", nar_size, expected.nar_size)
        statement = (
            "SELECT v.path FROM Refs JOIN ValidPaths AS v ON v.id = reference WHERE referrer = ?"
        )
        references = {name for (name,) in self._rows(statement, (row,))}
        self._expect(f"{path}: references", references, set(expected.references))
        try:
            running = hashlib.sha256()
            for block in nar_of_tree(path):
                running.update(block)
        except OSError as error:
            self.problems.append(f"{path}: {error}")
            return
        self._expect(f"{path}: contents", running.hexdigest(), expected.nar_hash)
        self._metadata(path)
        if path.is_derivation:
            drv = derivation.parse(Path(path).read_bytes(), self._items.store, path)
            wanted = {(name, str(output.path)) for name, output in drv.outputs.items()}
            outputs = self._rows("SELECT id, path FROM DerivationOutputs WHERE drv = ?", (row,))
            self._expect(f"{path}: outputs", set(outputs), wanted)

    def _metadata(self, path: StorePath) -> None:
        names = [str(path)]
        for top, directories, files in os.walk(path):
            names += [f"{top}/{name}" for name in directories + files]
        for name in names:
            status = os.lstat(name)
            self._expect(f"{name}: time", int(status.st_mtime), 1)
            self._expect(f"{name}: owner", status.st_uid, os.geteuid())
            if not stat.S_ISLNK(status.st_mode):
                mode = stat.S_IMODE(status.st_mode)
                self._expect(f"{name}: mode {mode:o}", mode in (0o444, 0o555), True)


def leftovers(directories: Directories) -> list[str]:
    """Return what lies in the store without being valid, and what builds left elsewhere."""
    connection = sqlite3.connect(f"file:{directories.database}/db.sqlite?mode=ro", uri=True)
    try:
        valid = {name for (name,) in connection.execute("SELECT path FROM ValidPaths")}
    finally:
        connection.close()
    store = directories.store
    found = [f"{store}/{name}" for name in os.listdir(store) if name != ".links"]
    pool = Path(store, ".links")
    return [
        *(name for name in found if name not in valid),
        *(str(entry) for entry in pool.iterdir() if entry.lstat().st_nlink == 1),
    ]
