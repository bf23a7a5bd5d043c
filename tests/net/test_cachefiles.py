"""The directory of answers, and what others may have put there (U15)."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.formats.narinfocache import CacheEntry, directory_name, serialise
from guixd.net.cachefiles import HOUSEKEEPING, LONGEST_KEPT, CacheFiles
from tests.support import temporary_directory

SERVER = "http://127.0.0.1:18099"
NOW = 2_000_000_000
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


class CacheCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(temporary_directory(self), "cache")
        self.files = CacheFiles(str(self.directory))
        self.place = self.directory / directory_name(SERVER)
        self.latest = self.directory / "last-expiry-cleanup"

    def keep(self, name: str, date: int = NOW, ttl: int = 3600, uri: str = SERVER) -> None:
        self.files.write(uri, {name: CacheEntry(uri, date, ttl, b"text")})

    def known(self, *names: str) -> set[str]:
        return set(self.files.read(SERVER, names))


class HostileFiles(CacheCase):
    def test_what_is_no_answer(self) -> None:
        """Links, pipes, directories, giants, garbage and other servers' answers are passed over."""
        self.keep("good")
        secret = self.directory / "secret"
        secret.write_bytes((self.place / "good").read_bytes())
        (self.place / "link").symlink_to(secret)
        os.mkfifo(self.place / "pipe")
        (self.place / "directory").mkdir()
        with (self.place / "giant").open("wb") as giant:
            giant.truncate(1 << 40)
        (self.place / "garbage").write_bytes(b"\xff(narinfo" * 100)
        (self.place / "empty").touch()
        other = CacheEntry("http://other", NOW, 3600, b"text")
        (self.place / "other").write_bytes(serialise(other))
        names = os.listdir(self.place)
        self.assertEqual(len(names), 8)
        self.assertEqual(self.known(*names, "missing"), {"good"})

    def test_no_room(self) -> None:
        """What cannot be written is left, without half of it; the old answer stays."""
        self.keep("old")
        before = (self.place / "old").read_bytes()
        script = (
            "import resource, signal, sys; from tests.net.test_cachefiles import *;"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100));"
            "CacheFiles(sys.argv[1]).write(SERVER, {name: CacheEntry(SERVER, NOW, 9, b'x' * 9999)"
            " for name in ('old', 'new')})"
        )
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", script, str(self.directory)]
        subprocess.run(command, check=True, cwd=root)
        self.assertEqual(os.listdir(self.place), ["old"])
        self.assertEqual((self.place / "old").read_bytes(), before)

    def test_no_directory(self) -> None:
        """A file in place of the directory, or nothing that can be written, keeps nobody."""
        self.directory.write_bytes(b"")
        self.keep("a")
        self.assertEqual(self.known("a"), set())
        self.files.tidy(NOW)
        self.assertEqual(self.directory.read_bytes(), b"")


class Housekeeping(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.keep("new", NOW - 10)
        self.keep("old", NOW - 3601)
        self.keep("long", NOW - LONGEST_KEPT - 1, 10 * LONGEST_KEPT)
        self.keep("not yet", NOW - LONGEST_KEPT + 1, 10 * LONGEST_KEPT)
        for name in ("new", "not yet"):
            os.utime(self.place / name, (NOW, NOW))

    def test_old_ones(self) -> None:
        """They go after their time, and after two days in any case."""
        self.keep("x", NOW - 9999, uri="http://gone")
        self.files.tidy(NOW)
        self.assertEqual(sorted(os.listdir(self.place)), ["new", "not yet"])
        self.assertEqual(self.latest.read_text(), str(NOW))
        self.assertFalse((self.directory / directory_name("http://gone")).exists())

    def test_every_five_days(self) -> None:
        """Somebody else may have done it; a time to come is not believed."""
        for then, done in ((NOW - HOUSEKEEPING + 1, False), (NOW - HOUSEKEEPING, True)):
            self.latest.write_text(str(then))
            self.files.tidy(NOW)
            self.assertEqual((self.place / "old").exists(), not done)
        for text in (str(NOW + 1), "garbage", "-1", "9" * 99, ""):
            self.keep("old", NOW - 3601)
            self.latest.write_text(text)
            self.files.tidy(NOW)
            self.assertFalse((self.place / "old").exists(), text)
            self.assertEqual(self.latest.read_text(), str(NOW))

    def test_one_at_a_time(self) -> None:
        """Who finds it locked leaves it to who has locked it."""
        self.latest.touch()
        command = [sys.executable, "-c", HOLD, str(self.latest)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            self.files.tidy(NOW)
            self.assertTrue((self.place / "old").exists())
            holder.communicate()
        self.files.tidy(NOW)
        self.assertFalse((self.place / "old").exists())
        with self.latest.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_strange_things(self) -> None:
        """They do not keep old files; links are not followed; what is being written stays."""
        canary = self.directory.parent / "canary"
        canary.mkdir()
        (canary / "old").write_bytes((self.place / "old").read_bytes())
        (self.directory / "link").symlink_to(canary)
        (self.place / "0directory").mkdir()
        (self.place / "0link").symlink_to(canary / "old")
        os.mkfifo(self.place / "0pipe")
        (self.place / "0garbage").write_text("garbage")
        (self.place / "new.123.tmp").touch()
        for name in ("0garbage", "0pipe", "0link", "0directory"):
            os.utime(self.place / name, (0, 0), follow_symlinks=False)
        os.utime(self.place / "new.123.tmp", (NOW, NOW))
        self.files.tidy(NOW)
        left = ["0directory", "new", "new.123.tmp", "not yet"]
        self.assertEqual(sorted(os.listdir(self.place)), left)
        self.assertTrue((canary / "old").exists())

    def test_false_dates(self) -> None:
        """Neither a date to come nor one in the name of the server keeps a file for ever."""
        uri = f"http://x/(date {10**12})(ttl {10**9})"
        self.keep("a", NOW - 9999, uri=uri)
        self.keep("future", 10**17, 10**17)
        os.utime(self.place / "future", (NOW - 4 * LONGEST_KEPT,) * 2)
        self.files.tidy(NOW)
        self.assertFalse((self.directory / directory_name(uri)).exists())
        self.assertFalse((self.place / "future").exists())
