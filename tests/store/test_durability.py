"""What is valid after the machine has stopped at once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from guixd.errors import StoreError
from guixd.formats.path import StorePath
from guixd.store import durability
from guixd.store.durability import boot_id, read_flushed
from guixd.store.items import Registration
from guixd.store.local import LocalStore
from guixd.store.recovery import drop_damaged, find_damaged, is_needed
from tests.store.test_local import Case


class DurabilityCase(Case):
    def setUp(self) -> None:
        super().setUp()
        self.store.close()
        self.store = self.open(durable=True)
        self.roots = self.store.temp_roots()

    def add(self, name: str, *references: StorePath) -> StorePath:
        return self.store.add_text(name, name.encode(), references, self.roots)

    def crash(self, *, boot: str | None = "another-start") -> LocalStore:
        """Return the store as it is opened after the daemon has died.

        :param boot: the name of the last start of the machine; None for the present one.
        """
        saved = self.base + "/saved"
        shutil.copytree(self.directories.database, saved)
        self.close(self.store)
        shutil.rmtree(self.directories.database)
        os.rename(saved, self.directories.database)
        if boot is not None:
            flushed = Path(self.directories.database, "flushed")
            flushed.write_text(f"{boot} {flushed.read_text().split()[1]}")
        return self.open(durable=True)

    def damage(self, path: StorePath) -> None:
        """Leave of PATH what a file system without its data may leave."""
        os.chmod(path, 0o644)
        os.truncate(path, 0)


class RecoveryTests(DurabilityCase):
    def test_machine_stopped(self) -> None:
        """S16: what was added last is looked at; what was lost becomes invalid."""
        flushed = self.add("flushed")
        self.store.database.checkpoint()()
        lost, good = self.add("lost"), self.add("good")
        user = self.add("user", lost)
        self.damage(flushed)  # which is not for us to find
        self.damage(lost)
        store = self.crash()
        self.assertTrue(is_needed(store))
        damaged = find_damaged(store)
        self.assertEqual(damaged, [lost])
        self.assertEqual(drop_damaged(store, damaged), [user, lost])
        self.assertFalse(is_needed(store))
        self.assertEqual(store.database.all_valid_paths(), sorted([flushed, good]))
        store.close()
        self.assertFalse(is_needed(self.open(durable=True)))

    def test_long_ago(self) -> None:
        """S16: what was added an hour before the last item was flushed by the kernel."""
        old, new = self.add("old"), self.add("new")
        for path in old, new:
            self.damage(path)
        self.store.database._rows(
            "UPDATE ValidPaths SET registrationTime = registrationTime - 3601 WHERE path = ?",
            str(old),
        )
        self.assertEqual(find_damaged(self.crash()), [new])

    def test_daemon_killed(self) -> None:
        """S16: when only the daemon has died, nothing need be read."""
        path = self.add("x")
        store = self.crash(boot=None)
        self.assertFalse(is_needed(store))
        self.assertTrue(store.is_valid(path))

    def test_collected(self) -> None:
        """S16, G16: what was removed is not valid, though the commit has not come through."""
        kept, gone = self.add("kept"), self.add("gone")
        self.store.database.checkpoint()()
        os.unlink(gone)
        store = self.crash()
        self.assertEqual(drop_damaged(store, find_damaged(store)), [gone])
        self.assertEqual(store.database.all_valid_paths(), [kept])

    def test_closed(self) -> None:
        """S16: nothing need be looked at after an orderly end, or in a store of others."""
        self.add("x")
        self.store.close()
        flushed = Path(self.directories.database, "flushed")
        row = flushed.read_text().split()[1]
        self.assertTrue(flushed.read_text().endswith(" closed\n"))
        for text in (f"another-start {row} closed", "garbage", ""):
            flushed.write_text(text)
            store = self.open(durable=True)
            self.assertFalse(is_needed(store), text)
            self.assertEqual(flushed.read_text(), f"{boot_id()} {row}\n")
            store.close()

    def test_not_wanted(self) -> None:
        """Tests need no disk that lasts."""
        store = self.open(durable=False)
        self.assertFalse(is_needed(store))
        self.assertEqual(drop_damaged(store, find_damaged(store)), [])


class FlushTests(DurabilityCase):
    def row(self) -> int:
        """Return up to where all is known to be on disk."""
        flushed = read_flushed(self.directories.database)
        assert flushed is not None
        return flushed.row

    def test_added_while_flushing(self) -> None:
        """S16: what becomes valid while the disk is flushed waits for the next time."""
        self.add("first")
        self.assertEqual(self.row(), 0)
        sync = durability.sync_file_system

        def slow(directory: str) -> None:
            if not self.row():
                self.add("second")
            sync(directory)

        self.patch(durability, "sync_file_system", slow)
        self.store.database.checkpoint()()
        self.assertEqual(self.row(), 1)
        self.store.database.checkpoint()()
        self.assertEqual(self.row(), 2)

    def test_flush_fails(self) -> None:
        """S16: what could not be flushed is not taken for flushed."""
        directory = self.directories.store
        self.add("x")
        os.rename(directory, directory + "-away")
        self.assertRaises(StoreError, self.store.database.checkpoint())
        self.store.close()
        self.assertEqual(self.row(), 0)
        os.rename(directory + "-away", directory)
        self.open(durable=True).close()
        self.assertEqual(self.row(), 1)

    def test_only_if_needed(self) -> None:
        """S16: closing a store flushes the disk, which may take long, if anything has changed."""
        syncs: list[str] = []
        self.patch(durability, "sync_file_system", syncs.append)
        self.add("x")
        self.store.close()
        self.assertEqual(syncs, [self.directories.store])
        store = self.open(durable=True)
        self.assertEqual(self.row(), 1)
        store.close()
        self.assertEqual(len(syncs), 1)

    def test_changed_without_new_row(self) -> None:
        """S16: what was repaired in place, or removed, is flushed by closing, too."""
        paths = [self.add("x"), self.add("y")]
        self.store.close()
        syncs: list[str] = []
        self.patch(durability, "sync_file_system", syncs.append)
        store = self.open(durable=True)
        info = store.database.path_info(paths[0])
        store.register([Registration(paths[0], info.nar_hash, info.nar_size, frozenset(), None)])
        store.close()
        self.assertEqual(len(syncs), 1)
        store = self.open(durable=True)
        store.invalidate(paths[0])
        store.close()
        self.assertEqual(len(syncs), 2)

    def test_on_demand(self) -> None:
        """S16: all can be flushed at once; without a log, too."""
        assert self.store.durability is not None
        self.add("x")
        self.store.durability.settle_all()
        self.store.close()
        self.store.durability.settle_all()
