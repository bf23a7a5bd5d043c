"""Lock files, against other processes that really hold them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import StoreError
from guixd.store import locks as module
from guixd.store.locks import FileLock, PathLocks, open_lock_file
from tests.store.holder import Holder
from tests.support import is_root, require, temporary_directory


class Case(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.path = self.directory + "/x"
        self.lock_file = self.path + ".lock"

    def acquire(self, *paths: str) -> PathLocks:
        locks = PathLocks.acquire(paths or [self.path])
        assert locks is not None
        self.addCleanup(locks.release, delete=False)
        return locks


class FileLockTests(Case):
    """Locks on files that stay."""

    def lock(self) -> FileLock:
        lock = FileLock(self.path)
        self.addCleanup(lock.close)
        return lock

    def test_foreign(self) -> None:
        """S16: record locks of another process conflict with ours, both ways."""
        holder, lock = Holder(self), self.lock()
        self.assertEqual(holder.ask("write", self.path), "yes")
        self.assertFalse(lock.acquire(exclusive=True))
        self.assertFalse(lock.acquire(exclusive=False))
        holder.ask("drop", self.path)
        self.assertTrue(lock.acquire(exclusive=True))
        self.assertEqual(holder.ask("read", self.path), "no")
        lock.release()
        self.assertEqual(holder.ask("read", self.path), "yes")
        self.assertTrue(lock.acquire(exclusive=False))
        self.assertEqual(os.stat(self.path).st_mode, 0o100600)

    def test_killed(self) -> None:
        """S16: a holder that is killed gives the lock up."""
        holder, lock = Holder(self), self.lock()
        holder.ask("write", self.path)
        self.assertFalse(lock.acquire(exclusive=True))
        holder.kill()
        self.assertTrue(lock.acquire(exclusive=True))
        self.assertEqual(Holder(self).ask("read", self.path), "no")

    def test_own_process(self) -> None:
        """S14: two locks in one process exclude each other and do not lose each other."""
        one, two = self.lock(), self.lock()
        self.assertTrue(one.acquire(exclusive=True))
        self.assertFalse(two.acquire(exclusive=False))
        two.close()
        self.assertEqual(Holder(self).ask("read", self.path), "no")

    def test_alone(self) -> None:
        """S14: a shared lock becomes exclusive for a moment only if it is the only one."""
        holder, lock = Holder(self), self.lock()
        self.assertFalse(lock.try_alone())  # it is not even held
        lock.acquire(exclusive=False)
        self.assertTrue(lock.try_alone())
        self.assertEqual(holder.ask("read", self.path), "no")
        lock.share()
        self.assertEqual(holder.ask("read", self.path), "yes")
        self.assertFalse(lock.try_alone())
        # Failing did not cost us our shared lock.
        self.assertEqual(holder.ask("write", self.path), "no")
        other = Holder(self)
        self.assertEqual(other.ask("read", self.path), "yes")
        other.kill()
        self.assertEqual(holder.ask("write", self.path), "no")
        lock.close()
        self.assertEqual(holder.ask("write", self.path), "yes")

    def test_waiting_foreigner(self) -> None:
        """S14: who waits for the big lock, as a session does, gets it after the moment."""
        holder, lock = Holder(self), self.lock()
        lock.acquire(exclusive=False)
        self.assertTrue(lock.try_alone())
        holder.begin("wait", self.path)
        self.assertEqual(holder.answer(), "waiting")
        lock.close()
        self.assertEqual(holder.answer(), "yes")

    def test_strange_files(self) -> None:
        """S15: only regular files are locks; links are not followed."""
        os.symlink(self.directory + "/elsewhere", self.path)
        self.assertRaises(StoreError, self.lock().acquire, exclusive=True)
        self.assertFalse(os.path.lexists(self.directory + "/elsewhere"))
        os.unlink(self.path)
        os.mkfifo(self.path)
        self.assertRaises(StoreError, self.lock().acquire, exclusive=True)


class PathLockTests(Case):
    """B35, S15, S16: locks of items."""

    def test_delete(self) -> None:
        """S4: after success the file is gone, after failure it stays."""
        locks = self.acquire()
        self.assertEqual(os.stat(self.lock_file).st_mode, 0o100600)
        self.assertTrue(PathLocks.is_held(self.path))
        locks.release(delete=False)
        self.assertEqual(os.stat(self.lock_file).st_size, 0)
        self.assertFalse(PathLocks.is_held(self.path))
        locks = self.acquire()
        locks.release(delete=True)
        self.assertFalse(os.path.exists(self.lock_file))
        locks.release(delete=True)
        self.assertEqual(os.listdir(self.directory), [])

    def test_foreign(self) -> None:
        """B35: another process holds one of several; none is kept then."""
        holder = Holder(self)
        holder.ask("write", self.directory + "/b.lock")
        wanted = [f"{self.directory}/{name}" for name in "cba"]
        self.assertIsNone(PathLocks.acquire(wanted))
        self.assertFalse(PathLocks.is_held(wanted[2]))
        self.assertEqual(holder.ask("write", self.directory + "/a.lock"), "yes")
        for name in "ab":
            holder.ask("drop", f"{self.directory}/{name}.lock")
        self.acquire(*wanted)
        for name in "abc":
            self.assertEqual(holder.ask("read", f"{self.directory}/{name}.lock"), "no")

    def test_own_process(self) -> None:
        """B35: nobody in this process gets what somebody here has."""
        self.acquire(self.directory + "/a", self.directory + "/b")
        self.assertIsNone(PathLocks.acquire([self.directory + "/b", self.directory + "/c"]))
        self.assertFalse(PathLocks.is_held(self.directory + "/c"))
        self.acquire(self.directory + "/c")

    def test_stale(self) -> None:
        """S15: a file that is not empty was removed by its holder; a new one is made."""
        holder = Holder(self)
        holder.ask("write", self.lock_file)
        opened = [open_lock_file(self.lock_file)]
        holder.ask("stale", self.lock_file)  # between our opening and locking
        self.patch(module, "open_lock_file", lambda name: (opened or [open_lock_file(name)]).pop())
        self.acquire()
        self.assertEqual(os.stat(self.lock_file).st_size, 0)
        self.assertEqual(Holder(self).ask("write", self.lock_file), "no")

    def test_full_disk(self) -> None:
        """S15, B36: what is right but the disk is full is no failure, and who waits sees it."""
        require(is_root(), "root")
        small = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", self.directory]
        subprocess.run(small, check=True)
        self.addCleanup(subprocess.run, ["umount", self.directory], check=True)
        locks, opened = self.acquire(), os.open(self.lock_file, os.O_RDONLY)
        self.addCleanup(os.close, opened)
        with self.assertRaises(OSError), Path(self.directory, "large").open("wb", 0) as large:
            while True:
                large.write(bytes(4096))
        locks.release(delete=True)
        self.assertEqual(os.fstat(opened).st_size, 1)
        self.assertEqual(os.listdir(self.directory), ["large"])

    def test_foreigner_sees_ours_stale(self) -> None:
        """S15: who waits for a file that we remove finds it not empty."""
        holder, locks = Holder(self), self.acquire()
        holder.begin("wait", self.lock_file)
        self.assertEqual(holder.answer(), "waiting")
        locks.release(delete=True)
        self.assertEqual(holder.answer(), "yes")
        self.assertEqual(holder.ask("empty", self.lock_file), "False")
        self.acquire()

    def test_killed(self) -> None:
        """S16: a killed holder frees the lock, and its file is used again."""
        holder = Holder(self)
        holder.ask("write", self.lock_file)
        self.assertIsNone(PathLocks.acquire([self.path]))
        holder.kill()
        before = os.stat(self.lock_file).st_ino
        self.acquire()
        self.assertEqual(os.stat(self.lock_file).st_ino, before)

    def test_link(self) -> None:
        """S15: a link in place of the file is refused, and nothing stays locked."""
        Path(self.lock_file).symlink_to("/etc/passwd")
        self.assertRaises(StoreError, PathLocks.acquire, [self.path])
        self.assertFalse(PathLocks.is_held(self.path))
