"""Log files and what clients get of them."""

from __future__ import annotations

import bz2
import gzip
import os
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.broadcast import TAIL, WINDOW, Broadcast
from guixd.build.logs import BATCH, FLUSH_AFTER, QUEUE_LIMIT, LogFile, LogReader, log_file
from guixd.build.request import Level
from guixd.build.threads import inline
from guixd.build.watchdog import Watchdog
from guixd.formats.path import StoreDirectory
from tests.build.graph import Recorder
from tests.support import temporary_directory

READ = {"gzip": gzip.decompress, "bzip2": bz2.decompress, "none": bytes}


class LogFileTests(SynchronousTestCase):
    """B29: log files."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.directory = temporary_directory(self)

    def log(self, compression: str = "gzip") -> LogFile:
        path = f"{self.directory}/x/{len(os.listdir(self.directory))}.log"
        log = LogFile(self.clock, inline, path, compression)
        log.open()
        self.addCleanup(log.release)
        return log

    def test_name(self) -> None:
        """B29: the name follows from the derivation's, cut after two characters."""
        drv = StoreDirectory("/s").child("ab" + "1" * 30 + "-x.drv")
        rest = "1" * 30 + "-x.drv"
        for compression, suffix in ("gzip", ".gz"), ("bzip2", ".bz2"), ("none", ""):
            name = log_file("/log", drv, compression)
            self.assertEqual(name, f"/log/drvs/ab/{rest}{suffix}")

    def test_empty(self) -> None:
        """B29: a log without text is a whole file of its kind; a short one ends in a moment."""
        for compression, read in READ.items():
            log = self.log(compression)
            self.assertEqual(log.is_small, compression != "bzip2")
            log.end()
            self.assertEqual(read(Path(log.path).read_bytes()), b"")
        log = self.log()
        log.write(bytes(BATCH // 2))
        self.assertFalse(log.is_small)
        self.successResultOf(Deferred.fromCoroutine(log.settle()))

    @settings(deadline=None, max_examples=30)
    @given(
        st.sampled_from(sorted(READ)),
        st.lists(st.tuples(st.binary(max_size=2000), st.integers(1, 90), st.booleans())),
    )
    def test_contents(self, compression: str, writes: list[tuple[bytes, int, bool]]) -> None:
        """B29: whatever is written when, the file holds it, and so it does in the middle."""
        log = self.log(compression)
        text = b""
        for piece, times, wait in writes:
            log.write(piece * times)
            text += piece * times
            if wait:
                self.clock.advance(FLUSH_AFTER)
                self.assertEqual(_read_all(log.path, compression), text)
        self.successResultOf(Deferred.fromCoroutine(log.settle()))
        log.end()
        log.end()
        self.assertEqual(READ[compression](Path(log.path).read_bytes()), text)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_settled(self) -> None:
        """B29: a long log that is settled can be read back, with nothing left to do in threads."""
        for compression in READ:
            log = self.log(compression)
            text = bytes(3 * TAIL) + b"end"
            log.write(text[:-1])
            log.write(text[-1:])
            self.successResultOf(Deferred.fromCoroutine(log.settle()))
            self.patch(log, "_threads", self.fail)
            self.successResultOf(Deferred.fromCoroutine(log.flush()))
            self.assertEqual(_read_all(log.path, compression), text)
            log.end()
            self.assertEqual(READ[compression](Path(log.path).read_bytes()), text)

    def test_older_log(self) -> None:
        """A new log replaces the older one; who still reads that keeps reading it."""
        log = self.log("none")
        log.write(b"old")
        log.end()
        reader = log.reader()
        assert reader is not None
        newer = LogFile(self.clock, inline, log.path, "none")
        newer.open()
        self.addCleanup(newer.release)
        self.assertEqual(Path(log.path).read_bytes(), b"")
        self.assertEqual(reader.read(), b"old")
        reader.close()

    def test_queue_is_bounded(self) -> None:
        """A builder that is faster than the compression is held for a while."""
        room: list[bool] = []
        steps: list[Deferred[None]] = []

        def later(function: object, *arguments: object) -> Deferred[None]:
            steps.append(Deferred())
            return steps[-1]

        log = LogFile(self.clock, later, f"{self.directory}/l", "none", room.append)
        log.open()
        self.addCleanup(log.release)
        for _ in range(QUEUE_LIMIT // BATCH + 2):
            log.write(b"x" * BATCH)
        self.assertEqual(room, [False])
        self.assertEqual(len(steps), 1)
        steps[0].callback(None)
        self.assertEqual(room, [False])
        steps[1].callback(None)
        self.assertEqual(room, [False, True])

    def test_disk_error(self) -> None:
        """An error of the disk ends the writing and nothing else, and is no news for the log."""
        log = self.log("none")
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, log._fd)
        os.close(full)
        log.write(b"x" * BATCH)
        self.assertEqual(log.problem, "No space left on device")
        log.write(b"x" * BATCH)
        log.end()
        self.assertEqual(log.problem, "No space left on device")


def _read_all(path: str, compression: str) -> bytes:
    reader = LogReader(path, compression)
    try:
        return b"".join(iter(reader.read, b""))
    finally:
        reader.close()


@dataclass
class Numbers(Recorder):
    """Keeps the number of the builder of each piece of output."""

    pids: list[int] = field(default_factory=list)

    def output(self, pid: int, chunk: bytes) -> None:
        self.pids.append(pid)


class BroadcastTests(SynchronousTestCase):
    """B7: everybody gets everything in order, at their own pace."""

    def test_order(self) -> None:
        """Late clients get lines and output in the order in which they came."""
        broadcast, early = Broadcast(inline), Recorder()
        broadcast.follow(early)
        broadcast.log(Level.INFO, "one")
        broadcast.begin(7, "@ begun")
        broadcast.output(b"two")
        broadcast.trace("@ three")
        broadcast.output(b"four")
        late = Recorder()
        follower = broadcast.follow(late)
        self.assertEqual(late.events, early.events)
        self.assertEqual(
            late.events,
            [
                ("log", 1, "one"),
                ("trace", "@ begun"),
                ("output", b"two"),
                ("trace", "@ three"),
                ("output", b"four"),
            ],
        )
        self.assertNoResult(follower.done)
        broadcast.finish()
        self.successResultOf(follower.done)

    def test_rounds(self) -> None:
        """B14, B29: who comes late learns of each round whose output it is, of which guix knows."""
        broadcast, early, late = Broadcast(inline), Numbers(), Numbers()
        broadcast.follow(early)
        for pid in 7, 8:
            broadcast.begin(pid, f"@ begun {pid}")
            broadcast.output(b"it")
        broadcast.follow(late)
        self.assertEqual(early.pids, [7, 8])
        self.assertEqual(late.pids, early.pids)

    def test_memory_is_bounded(self) -> None:
        """Without a log file only the end is kept, and that is said."""
        broadcast = Broadcast(inline)
        for _ in range(100):
            broadcast.output(b"x" * (TAIL // 10))
        self.assertLessEqual(len(broadcast._tail), 2 * TAIL)
        late = Recorder()
        broadcast.follow(late)
        self.assertIn("were not kept", late.logs[0])
        self.assertGreaterEqual(len(late.text), TAIL)

    def test_hold(self) -> None:
        """The builder is held while everybody is behind; leaving counts as catching up."""
        held: list[bool] = []
        broadcast = Broadcast(inline, held.append)
        slow, quick = Recorder(blocked=Deferred()), Recorder()
        broadcast.follow(slow)
        follower = broadcast.follow(quick)
        broadcast.output(b"x" * (WINDOW + 1))
        self.assertEqual(held, [])
        follower.leave()
        self.assertEqual(held, [True])
        blocked, slow.blocked = slow.blocked, None
        assert blocked is not None
        blocked.callback(None)
        self.assertEqual(held, [True, False])
        self.assertEqual(len(slow.text), WINDOW + 1)


class WatchdogTests(SynchronousTestCase):
    """B11, B12: limits."""

    def test_held_time_is_no_silence(self) -> None:
        """What the builder cannot write because nobody reads is not its silence."""
        clock, reasons = Clock(), list[str]()
        dog = Watchdog(clock, reasons.append, silence=10)
        dog.hold(True)
        clock.advance(100)
        dog.hold(False)
        clock.advance(9)
        self.assertEqual(reasons, [])
        clock.advance(1)
        self.assertEqual(len(reasons), 1)
        self.assertEqual(clock.getDelayedCalls(), [])

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.floats(0, 8), max_size=20))
    def test_silence(self, pauses: list[float]) -> None:
        """B12: it expires if and only if a pause is as long as the limit."""
        clock, reasons = Clock(), list[str]()
        dog = Watchdog(clock, reasons.append, silence=5)
        for pause in pauses:
            clock.advance(pause)
            dog.heard(1)
        self.assertEqual(bool(reasons), any(pause >= 5 for pause in pauses))
        dog.stop()
        self.assertEqual(clock.getDelayedCalls(), [])
