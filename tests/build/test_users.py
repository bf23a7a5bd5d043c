"""Build users."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from pathlib import Path

from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.users import (
    REST,
    RETRY,
    BuildUser,
    BuildUserPool,
    UsersError,
    group_members,
    pool_of,
    range_members,
)
from guixd.settings import Directories, Settings, UidRange
from tests.support import temporary_directory

_HOLDER = """
import fcntl, struct, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


class PoolTests(SynchronousTestCase):
    """X20: a uid serves one build at a time."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.directory = temporary_directory(self) + "/userpool"
        self.users = range_members(UidRange(61001, 2, 61000))
        self.pool = BuildUserPool(self.clock, self.directory, lambda: self.users)

    def test_exhausted_pool_queues(self) -> None:
        """X20: the third build waits until a user is free; who gives up is passed over."""
        first = self.successResultOf(self.pool.acquire())
        second = self.successResultOf(self.pool.acquire())
        self.assertEqual({first.uid, second.uid}, {61001, 61002})
        third, fourth = self.pool.acquire(), self.pool.acquire()
        self.assertNoResult(third)
        third.cancel()
        self.failureResultOf(third, CancelledError)
        self.pool.release(second)
        self.assertEqual(self.successResultOf(fourth), second)

    def test_lock_file(self) -> None:
        """X20: the lock file is named by the uid, 0600, and locked as others lock it."""
        user = self.successResultOf(self.pool.acquire())
        path = Path(self.directory, str(user.uid))
        self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        asked = struct.pack("@hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        with path.open("r+b") as file:
            held = struct.unpack("@hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))
            self.assertEqual(held[0], fcntl.F_WRLCK)
            self.pool.release(user)
            free = struct.unpack("@hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))
            self.assertEqual(free[0], fcntl.F_UNLCK)
        self.assertTrue(path.exists())

    def test_clean_user(self) -> None:
        """X22: a user known to have no process stays locked for a moment, and is so again."""
        user = self.successResultOf(self.pool.acquire())
        self.assertFalse(self.pool.is_clean(user))
        self.pool.release(user, clean=True)
        self.assertEqual(self.successResultOf(self.pool.acquire()), user)
        self.assertTrue(self.pool.is_clean(user))
        self.pool.release(user, clean=True)
        self.clock.advance(REST)
        self.assertEqual(self.successResultOf(self.pool.acquire()), user)
        self.assertFalse(self.pool.is_clean(user))
        self.pool.release(user)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_foreign_holder(self) -> None:
        """X20: a user that another process has is passed over, and waited for if it must be."""
        Path(self.directory).mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", _HOLDER, f"{self.directory}/61001"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as holder:
            assert holder.stdin is not None and holder.stdout is not None
            self.assertEqual(holder.stdout.readline(), b"held\n")
            self.assertEqual(self.successResultOf(self.pool.acquire()).uid, 61002)
            waiting = self.pool.acquire()
            self.assertNoResult(waiting)
            self.clock.advance(RETRY)
            self.assertNoResult(waiting)
            holder.stdin.close()
            holder.wait()
        self.clock.advance(RETRY)
        self.assertEqual(self.successResultOf(waiting).uid, 61001)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_own_user(self) -> None:
        """The daemon's own user is refused."""
        pool = BuildUserPool(self.clock, self.directory, lambda: (BuildUser("me", os.getuid(), 1),))
        self.failureResultOf(pool.acquire(), UsersError)


class MembersTests(SynchronousTestCase):
    """Who is a build user."""

    def test_missing_group(self) -> None:
        """A group that does not exist is an error that names it."""
        with self.assertRaisesRegex(UsersError, "no-such-group"):
            group_members("no-such-group")

    def test_pool_of_settings(self) -> None:
        """The settings say where users come from; a broken group fails each acquisition."""
        directories = Directories(state=temporary_directory(self))
        clock = Clock()
        self.assertIsNone(pool_of(Settings(directories=directories), clock))
        pool = pool_of(Settings(directories=directories, build_users_group="no-such-group"), clock)
        assert pool is not None
        self.assertEqual(pool.size, 0)
        self.failureResultOf(pool.acquire(), UsersError)
        pool = pool_of(
            Settings(directories=directories, build_uids=UidRange(61001, 3, 61000)), clock
        )
        assert pool is not None
        self.assertEqual(pool.size, 3)
        user = self.successResultOf(pool.acquire())
        self.assertEqual((user.uid, user.gid, user.groups), (61001, 61000, (61000,)))
