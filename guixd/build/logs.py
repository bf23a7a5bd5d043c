"""Log files of builds: written and compressed off the reactor's thread (spec: build §11)."""

from __future__ import annotations

import bz2
import os
import zlib
from collections.abc import Callable
from functools import cache

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from guixd.build.threads import Threads
from guixd.formats.path import StorePath

_log = Logger()

FLUSH_AFTER = 1.0
"""Seconds after which what a builder wrote can be read from the file."""
QUEUE_LIMIT = 4 << 20
"""Bytes waiting to be compressed at which the builder is held."""
GZIP_LEVEL = 3
"""Twice as fast as level 6 and 5 % larger on ordinary build output."""
BATCH = 64 << 10
"""Bytes that are compressed at once, unless it is time to flush."""
SMALL = 4 << 10
"""Bytes that are compressed in a moment."""
BLOCK = 256 << 10
READ_BACK = 1 << 20
"""The end of a log that nobody reads back from the file, in bytes; see `broadcast.TAIL`."""
READ_SIZE = 4 << 10

SUFFIXES = {"gzip": ".gz", "bzip2": ".bz2", "none": ""}


def log_file(directory: str, drv: StorePath, compression: str) -> str:
    """Return the name of the log file of the derivation DRV below the log DIRECTORY."""
    base = drv.base
    return f"{directory}/drvs/{base[:2]}/{base[2:]}{SUFFIXES[compression]}"


class _Plain:
    def add(self, data: bytes) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""

    end = flush


class _Gzip:
    def __init__(self) -> None:
        self._stream = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 31)

    def add(self, data: bytes) -> bytes:
        return self._stream.compress(data)

    def flush(self) -> bytes:
        return self._stream.flush(zlib.Z_SYNC_FLUSH)

    def end(self) -> bytes:
        return self._stream.flush()


class _Bzip2:
    """A flush ends a stream; the file is then several streams in a row."""

    def __init__(self) -> None:
        self._stream: bz2.BZ2Compressor | None = bz2.BZ2Compressor()

    def add(self, data: bytes) -> bytes:
        if self._stream is None:
            self._stream = bz2.BZ2Compressor()
        return self._stream.compress(data)

    def flush(self) -> bytes:
        stream, self._stream = self._stream, None
        return stream.flush() if stream is not None else b""

    end = flush


_CODECS: dict[str, Callable[[], _Plain | _Gzip | _Bzip2]] = {
    "gzip": _Gzip,
    "bzip2": _Bzip2,
    "none": _Plain,
}


@cache
def _empty(compression: str) -> bytes:
    """Return the file of a log without text; many builds write nothing."""
    return _CODECS[compression]().end()


class LogFile:
    """A log being written.

    Made in the reactor's thread; `open` blocks and is for a worker thread, like
    the private steps that `write` starts there.  A disk error ends the writing,
    not the build.

    :ivar problem: why not all of it could be written; empty if it was.
    :param on_room: called with False when too much is queued, with True when
        there is room again.
    """

    def __init__(
        self,
        clock: IReactorTime,
        threads: Threads,
        path: str,
        compression: str,
        on_room: Callable[[bool], None] = lambda room: None,
    ) -> None:
        self.path = path
        self.problem = ""
        self.compression = compression
        self._clock = clock
        self._threads = threads
        self._on_room = on_room
        self._codec: _Plain | _Gzip | _Bzip2 | None = None
        self._fd = -1
        self._writing = False
        self._pending: list[bytes] = []
        self._queued = 0
        self._size = 0
        self._working: list[Deferred[None]] | None = None
        self._held = False
        self._unflushed = False
        self._timer: IDelayedCall | None = None

    def open(self) -> None:
        """Begin a new file in place of an older one, or see that there is a `problem`."""
        try:
            self._open()
        except OSError as error:
            self.problem = _reason(error)

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        while self._fd < 0:
            try:
                self._fd = os.open(self.path, flags, 0o666)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
            except FileExistsError:
                os.unlink(self.path)
        self._writing = True

    def write(self, data: bytes) -> None:
        """Add DATA; returns at once."""
        if not self._writing:
            return
        self._pending.append(data)
        self._queued += len(data)
        self._size += len(data)
        if self._working is None:
            if self._queued >= BATCH:
                self._start()
            elif self._timer is None:
                self._timer = self._clock.callLater(FLUSH_AFTER, self._flush)
        if not self._held and self._queued > QUEUE_LIMIT:
            self._held = True
            self._on_room(False)

    def _start(self, *, flush: bool = False) -> None:
        data = b"".join(self._pending)
        self._pending.clear()
        self._working = []
        self._threads(self._step, data, flush).addCallbacks(
            self._stepped, self._failed, callbackArgs=(len(data), flush)
        )

    def _step(self, data: bytes, flush: bool) -> None:
        if self._codec is None:
            self._codec = _CODECS[self.compression]()
        out = self._codec.add(data)
        if flush:
            out += self._codec.flush()
        _write_all(self._fd, out)

    def _stepped(self, _: object, size: int, flushed: bool) -> None:
        waiters, self._working = self._working or [], None
        self._queued -= size
        self._unflushed = not flushed and (self._unflushed or size > 0)
        if self._queued >= BATCH:
            self._start()
        elif (self._pending or self._unflushed) and self._timer is None:
            self._timer = self._clock.callLater(FLUSH_AFTER, self._flush)
        if self._held and self._queued <= QUEUE_LIMIT // 4:
            self._held = False
            self._on_room(True)
        for waiter in waiters:
            waiter.callback(None)

    def _failed(self, failure: Failure) -> None:
        if not isinstance(failure.value, OSError):  # who makes the log tells of disks
            _log.failure("cannot write the log {path}", failure, path=self.path)
        self.problem = _reason(failure.value)
        waiters, self._working = self._working or [], None
        self._writing = self._unflushed = False
        self._queued = 0
        self._pending.clear()
        if self._held:
            self._held = False
            self._on_room(True)
        for waiter in waiters:
            waiter.callback(None)

    def _flush(self) -> None:
        self._timer = None
        if not self._unflushed and not self._pending:
            return
        if self._working is None:
            self._start(flush=True)
        else:
            self._timer = self._clock.callLater(FLUSH_AFTER, self._flush)

    def _idle(self) -> Deferred[None]:
        waiter: Deferred[None] = Deferred()
        if self._working is None:
            waiter.callback(None)
        else:
            self._working.append(waiter)
        return waiter

    async def flush(self) -> None:
        """Wait until everything written so far can be read back with `reader`."""
        while self._working is not None or self._pending or self._unflushed:
            if self._working is None:
                self._start(flush=True)
            await self._idle()

    async def settle(self) -> None:
        """Wait for the steps in other threads, before `end` in one; write nothing after it."""
        if self._size > READ_BACK:
            # Who reads back meanwhile must find it all, and start no step beside `end`.
            await self.flush()
        while self._working is not None:
            await self._idle()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def exists(self) -> bool:
        """Whether there is a file that can be read, until `release`."""
        return self._fd >= 0

    @property
    def is_small(self) -> bool:
        """Whether `end` takes but a moment."""
        return self._codec is None and self._queued <= SMALL and self.compression != "bzip2"

    def end(self) -> None:
        """Write what is left and end the file; blocks.  A second call does nothing."""
        if self._writing:
            self._writing = self._unflushed = False
            data = b"".join(self._pending)
            self._pending.clear()
            try:
                self._write_end(data)
            except OSError as error:
                self.problem = _reason(error)

    def _write_end(self, data: bytes) -> None:
        if self._codec is None and not data:
            _write_all(self._fd, _empty(self.compression))
            return
        codec = self._codec or _CODECS[self.compression]()
        _write_all(self._fd, codec.add(data) + codec.end())

    def release(self) -> None:
        """Let go of the closed file, which nobody will read back any more."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def reader(self) -> LogReader | None:
        """Return a reader of the file, or `None` if there is none.

        It reads this very file even when a later build has replaced its name.
        """
        try:
            return LogReader(f"/proc/self/fd/{self._fd}", self.compression)
        except OSError:
            return None


def _reason(error: BaseException | None) -> str:
    return (isinstance(error, OSError) and error.strerror) or repr(error)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class LogReader:
    """Reads a log, which may still grow, from its beginning.  Blocks.

    :raises OSError: the file cannot be opened.
    """

    def __init__(self, path: str, compression: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._compression = compression
        self._decoder: zlib._Decompress | bz2.BZ2Decompressor | None = None
        self._rest = b""
        self.position = 0
        """How many bytes of the log were read."""

    def read(self) -> bytes:
        """Return the next bytes of the log; empty where it ends now.

        A call returns at most some MiB however well the log is compressed.
        """
        while True:
            if not self._rest and not self._backlog():
                self._rest = os.read(self._fd, READ_SIZE)
                if not self._rest:
                    return b""
            data = self._decode()
            if data:
                self.position += len(data)
                return data

    def _backlog(self) -> bool:
        decoder = self._decoder
        return isinstance(decoder, bz2.BZ2Decompressor) and not (decoder.needs_input or decoder.eof)

    def _decode(self) -> bytes:
        if self._compression == "none":
            data, self._rest = self._rest, b""
            return data
        if self._decoder is None or self._decoder.eof:
            self._decoder = (
                zlib.decompressobj(31) if self._compression == "gzip" else bz2.BZ2Decompressor()
            )
        decoder = self._decoder
        if isinstance(decoder, bz2.BZ2Decompressor):
            data = decoder.decompress(self._rest, BLOCK)
        else:
            data = decoder.decompress(self._rest)
        self._rest = decoder.unused_data if decoder.eof else b""
        return data

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
