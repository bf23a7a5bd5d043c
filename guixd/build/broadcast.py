"""What one build tells its clients: everyone gets everything, each at its own pace.

The end of the builder's output is kept in memory; what a late or slow client
needs beyond that is read back from the log file (spec: build §4, §11).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from guixd.build.lastwords import last_lines
from guixd.build.logs import LogFile, LogReader
from guixd.build.request import Level
from guixd.build.threads import Threads

_log = Logger()

TAIL = 1 << 20
"""Bytes of output surely kept in memory; at most twice as many are."""
BLOCK = 64 << 10
"""The longest piece that a client gets at once, in bytes."""
WINDOW = 256 << 10
"""How far behind every client must be for the builder to be held, in bytes."""


class Observer(Protocol):
    """`interfaces.IBuildObserver` for the type checker."""

    def log(self, level: int, text: str) -> None: ...
    def trace(self, line: str, instead: str = "") -> None: ...
    def output(self, pid: int, chunk: bytes) -> None: ...
    def last_words(self, lines: Sequence[str], file: str) -> None: ...
    def full(self) -> Deferred[None] | None: ...


@dataclass(frozen=True, slots=True)
class _Message:
    """What is to be told at a place in the output; the output after it may be of another PID."""

    position: int
    tell: Callable[[Observer], None]
    pid: int


class Broadcast:
    """The log of one build and those who follow it.

    :param hold: called with True when every client is far behind, with False
        when one has caught up.
    """

    def __init__(self, threads: Threads, hold: Callable[[bool], None] = lambda on: None) -> None:
        self.log_file: LogFile | None = None
        self._threads = threads
        self._hold = hold
        self._holding = False
        self._followers: list[Follower] = []
        self._messages: list[_Message] = []
        self._pid = 0
        self._end = 0
        self._tail = bytearray()
        self._finished = False

    def follow(self, observer: Observer) -> Follower:
        """Begin to tell OBSERVER everything from the start."""
        follower = Follower(self, observer)
        self._followers.append(follower)
        follower._pump()
        self._weigh()
        return follower

    def log(self, level: Level, text: str) -> None:
        """Send lines of the daemon's own."""
        self._add(lambda observer: observer.log(level, text))

    def trace(self, line: str, instead: str = "") -> None:
        """Send a machine-readable line, or INSTEAD to who gets no such lines."""
        self._add(lambda observer: observer.trace(line, instead))

    def recall(self, observer: Observer | None = None, *, lines: bool) -> None:
        """Say where the log of a failed build is, and its last LINES; to one OBSERVER or to all."""
        words = last_lines(self._tail) if lines else ()
        file = self.log_file.path if self.log_file is not None and self.log_file.exists else ""
        if observer is None:
            self._add(lambda observer: observer.last_words(words, file))
        else:
            observer.last_words(words, file)

    def _add(self, tell: Callable[[Observer], None]) -> None:
        self._messages.append(_Message(self._end, tell, self._pid))
        for follower in list(self._followers):
            follower._pump()

    def begin(self, pid: int, line: str) -> None:
        """Say whose output follows, and tell programs so by LINE."""
        self._pid = pid
        self.trace(line)

    def output(self, chunk: bytes) -> None:
        """Send what the builder wrote."""
        if self.log_file is not None:
            self.log_file.write(chunk)
        self._tail += chunk
        self._end += len(chunk)
        if len(self._tail) > 2 * TAIL:
            del self._tail[:-TAIL]
        for follower in list(self._followers):
            follower._pump()
        self._weigh()

    def finish(self) -> None:
        """Say that nothing more comes."""
        self._finished = True
        for follower in list(self._followers):
            follower._pump()
        self._weigh()
        self._release()

    def _weigh(self) -> None:
        behind = bool(self._followers) and all(
            self._end - follower._position > WINDOW for follower in self._followers
        )
        if behind != self._holding:
            self._holding = behind
            self._hold(behind)

    def _remove(self, follower: Follower) -> None:
        if follower in self._followers:
            self._followers.remove(follower)
            self._weigh()
            self._release()

    def _release(self) -> None:
        if self._finished and not self._followers and self.log_file is not None:
            self.log_file.release()

    def _tail_from(self, position: int, limit: int) -> bytes:
        """Return output in memory between the positions; empty if it is gone."""
        start = self._end - len(self._tail)
        if position < start:
            return b""
        return bytes(self._tail[position - start : min(limit - start, position - start + BLOCK)])


class Follower:
    """One client's place in the log of a build.

    :ivar done: fires when the client has been given all that there is.
    """

    def __init__(self, broadcast: Broadcast, observer: Observer) -> None:
        self.done: Deferred[None] = Deferred()
        self._broadcast = broadcast
        self._observer = observer
        self._position = 0
        self._message = 0
        self._pid = 0
        self._waiting: Deferred[None] | None = None
        self._reading = False
        self._pumping = False
        self._gone = False
        self._reader: LogReader | None = None

    def leave(self) -> None:
        """Tell the client nothing more."""
        self._gone = True
        self._close_reader()
        self._broadcast._remove(self)

    def _pump(self) -> None:
        """Pass on all that the client takes now."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._step():
                pass
        finally:
            self._pumping = False
        if self._complete() and not self._gone:
            self.leave()
            self.done.callback(None)

    def _complete(self) -> bool:
        all_of = self._broadcast
        return (
            all_of._finished
            and self._waiting is None
            and self._position == all_of._end
            and self._message == len(all_of._messages)
        )

    def _step(self) -> bool:
        """Pass on one thing; False when there is nothing or the client does not take it."""
        if self._gone or self._waiting is not None or self._reading:
            return False
        all_of = self._broadcast
        messages = all_of._messages
        limit = messages[self._message].position if self._message < len(messages) else all_of._end
        if self._position < limit:
            full = self._observer.full()
            if full is not None:
                self._waiting = full
                full.addBoth(self._ready)
                return False
            chunk = all_of._tail_from(self._position, limit)
            if not chunk:
                self._read_back()
                return not self._reading
            self._position += len(chunk)
            self._observer.output(self._pid, chunk)
            return True
        if self._message < len(messages):
            message = messages[self._message]
            self._message += 1
            self._pid = message.pid
            message.tell(self._observer)
            return True
        return False

    def _ready(self, _: object) -> None:
        self._waiting = None
        self._pump()
        self._broadcast._weigh()

    # What is no longer in memory comes from the file.

    def _read_back(self) -> None:
        self._reading = True
        Deferred.fromCoroutine(self._from_file()).addErrback(
            lambda failure: _log.failure("cannot read a log back", failure)
        )

    async def _from_file(self) -> None:
        all_of = self._broadcast
        file = all_of.log_file
        chunk = b""
        if file is not None:
            await file.flush()
            if self._reader is None and not self._gone:
                self._reader = file.reader()
            try:
                while self._reader is not None and not chunk and not self._gone:
                    start = self._reader.position
                    data = await all_of._threads(self._reader.read)
                    if not data:
                        break
                    chunk = data[max(0, self._position - start) :]
            except Exception:  # noqa: BLE001
                _log.failure("cannot read the log {path} back", path=file.path)
        if self._gone:
            self._reading = False
            self._close_reader()
            return
        if chunk:
            # Daemon messages in the midst of old output may come a little late.
            self._position += len(chunk)
            self._observer.output(self._pid, chunk)
        else:
            start = all_of._end - len(all_of._tail)
            self._observer.log(
                Level.ERROR, f"{start - self._position} bytes of the build's log were not kept"
            )
            self._position = start
        self._reading = False
        self._pump()
        all_of._weigh()

    def _close_reader(self) -> None:
        if self._reader is not None and not self._reading:
            self._reader.close()
            self._reader = None
