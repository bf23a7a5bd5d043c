"""One store, used by guixd's own store layer and by the stock daemon at the same time."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.trial.unittest import TestCase

from guixd.client import Client, connect
from guixd.formats.path import StoreDirectory, StorePath
from guixd.settings import Directories
from guixd.store.local import LocalStore
from tests.interop.guest import requires_guest
from tests.interop.place import STOCK, Place


@requires_guest
class SharedStore(TestCase):
    """S9, S14, S16, G2: files, database, locks and roots mean the same to both."""

    def setUp(self) -> None:
        self.place = Place(self)
        base = str(self.place.directory)
        self.directories = Directories(
            base + "/store", base + "/state", base + "/log", base + "/state/db", base + "/etc"
        )
        self.place.binds = {base: base}
        self.place.names.update(
            NIX_STORE_DIR=self.directories.store,
            GUIX_STATE_DIRECTORY=self.directories.state,
            GUIX_LOG_DIRECTORY=self.directories.log,
            GUIX_CONFIGURATION_DIRECTORY=self.directories.configuration,
        )

    def open(self) -> LocalStore:
        store = LocalStore(self.directories)
        store.open()
        self.addCleanup(lambda: None if store.closed else store.close())
        return store

    async def stock(self) -> Client:
        """Start the stock daemon, once, and connect to it."""
        from twisted.internet import reactor

        if "socket" not in self.place._processes:
            self.place.start(STOCK, "--disable-chroot")
        endpoint = UNIXClientEndpoint(reactor, self.directories.state + "/daemon-socket/socket")
        client = await connect(endpoint, store=StoreDirectory(self.directories.store))
        self.addCleanup(client.close)
        return client

    def test_ours_first(self) -> Deferred[None]:
        """S9: the stock daemon reads what we made, and we what it adds."""
        return Deferred.fromCoroutine(self._ours_first())

    async def _ours_first(self) -> None:
        store = self.open()
        roots = store.temp_roots()
        first = store.add_text("first", b"1", (), roots)
        second = store.add_text("second", first.encode(), (first,), roots)
        drv = store.add_text("none.drv", b'Derive([],[],[],"x","/x",[],[])', (), roots)
        stock = await self.stock()
        self.assertEqual(list(await stock.all_valid_paths()), store.database.all_valid_paths())
        self.assertEqual(list(await stock.references(second)), [first])
        self.assertEqual(list(await stock.derivation_outputs(drv)), [])
        info = await stock.path_info(second)
        ours = store.database.path_info(second)
        self.assertEqual(
            (info.nar_hash, info.nar_size, info.registration_time),
            (ours.nar_hash.hex(), ours.nar_size, ours.registration_time),
        )
        third = await stock.add_text("third", b"3", [second])
        self.assertTrue(store.is_valid(third))
        self.assertEqual(store.database.path_info(third).references, (second,))
        self.assertEqual(store.closure([third]), {first, second, third})

    def test_stock_first(self) -> Deferred[None]:
        """S9, S12: we read what the stock daemon made; both make the same tables."""
        return Deferred.fromCoroutine(self._stock_first())

    async def _stock_first(self) -> None:
        stock = await self.stock()
        first = await stock.add_text("first", b"1")
        store = self.open()
        roots = store.temp_roots()
        self.assertEqual(store.database.all_valid_paths(), [first])
        second = store.add_text("second", first.encode(), (first,), roots)
        self.assertEqual(list(await stock.referrers(first)), [second])
        own = LocalStore(
            Directories(*(f"{self.place.directory}/own/{n}" for n in ("s", "v", "l", "d", "e")))
        )
        own.open()
        self.addCleanup(own.close)
        self.assertEqual(*(tables(d.database) for d in (self.directories, own.directories)))

    def test_locks(self) -> Deferred[None]:
        """S14: a stock session holds the big lock, so that we use the item's lock file."""
        return Deferred.fromCoroutine(self._locks())

    async def _locks(self) -> None:
        store = self.open()
        roots = store.temp_roots()
        self.assertTrue(store._big_lock.try_alone())
        store._big_lock.share()
        stock = await self.stock()
        self.assertFalse(store._big_lock.try_alone())
        path = store.add_text("x", b"1", (), roots)
        self.assertTrue(await stock.is_valid_path(path))
        self.assertFalse(os.path.lexists(path + ".lock"))
        self.assertEqual(await stock.add_text("x", b"1"), path)

    def test_roots(self) -> Deferred[None]:
        """G2, G3: a collector of the stock daemon spares what our sessions protect."""
        return Deferred.fromCoroutine(self._roots())

    async def _roots(self) -> None:
        store = self.open()
        roots = store.temp_roots()
        kept = store.add_text("kept", b"1", (), roots)
        linked = store.add_text("linked", b"2", (), store.temp_roots())
        link = f"{self.place.directory}/result"
        Path(link).symlink_to(linked)
        store.add_indirect_root(link)
        stock = await self.stock()
        self.assertEqual(list(await stock.find_roots()), [(link, linked)])
        gone = await stock.add_text("gone", b"3")
        self.assertEqual(await self.delete(stock), {gone})
        self.assertFalse(store.is_valid(gone))
        self.assertTrue(store.is_valid(kept) and store.is_valid(linked))
        roots.close()
        self.assertEqual(await self.delete(stock), {kept})
        self.assertFalse(store.is_valid(kept))

    async def delete(self, stock: Client) -> set[StorePath]:
        """Have the stock daemon delete what is dead; return those that look like items."""
        deleted = (await stock.collect_garbage(2)).paths
        return {path for path in deleted if not path.endswith(".lock")}


def tables(directory: str) -> list[object]:
    """Return what the tables of a database are, without the wording of their making."""
    connection = sqlite3.connect(f"{directory}/db.sqlite")
    try:
        questions = ["SELECT type, name, tbl_name FROM sqlite_master ORDER BY 1, 2"]
        questions += [
            f"PRAGMA {pragma}({table})"
            for table in ("ValidPaths", "Refs", "DerivationOutputs", "FailedPaths")
            for pragma in ("table_info", "foreign_key_list", "index_list")
        ]
        questions += [
            f"PRAGMA {pragma}"
            for pragma in ("page_size", "encoding", "user_version", "journal_mode", "auto_vacuum")
        ]
        return [connection.execute(question).fetchall() for question in questions]
    finally:
        connection.close()
