"""A whole daemon for the fuzzer atheris, which follows the branches taken; not part of the suite.

    pip install atheris
    python -m tests.load.atheris_target -max_total_time=60 CORPUS

Each input is what one client sends, the handshake included.  The daemon is in this
process, with a store of its own, and works in turns that end when it has nothing to do.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import atheris
from twisted.logger import globalLogPublisher

with atheris.instrument_imports(include=["guixd"]):
    from guixd.build.threads import inline
    from guixd.formats import operations as op
    from guixd.formats.messages import Greeting
    from guixd.formats.path import StoreDirectory
    from guixd.formats.wire import encode_bytes
    from guixd.service.connection import Connection
    from guixd.service.reception import Reception
    from guixd.service.shared import Daemon
    from guixd.settings import Settings
    from guixd.testing import FakeBuilder, directories_below

MOST_TURNS = 20_000
"""Turns after which a connection that is never done hangs."""


class _Call:
    """A delayed call of `Turns`."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work: Callable[[], object] | None = work

    def cancel(self) -> None:
        self.work = None

    def active(self) -> bool:
        return self.work is not None


class Turns:
    """As much of a reactor as a daemon needs; delays are left out."""

    def __init__(self) -> None:
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()
        self._calls: list[_Call] = []
        self.seconds = time.monotonic
        self.addReader, self.removeReader = self.readers.add, self.readers.discard
        self.addWriter, self.removeWriter = self.writers.add, self.writers.discard

    def callLater(self, delay: float, work: Callable[..., object], *args: Any, **named: Any) -> Any:
        call = _Call(lambda: work(*args, **named))
        self._calls.append(call)
        return call

    def turn(self) -> bool:
        """Do what can be done now; whether there was anything."""
        calls, self._calls = self._calls, []
        for call in calls:
            work, call.work = call.work, None
            if work is not None:
                work()
        reading, writing, _ = select.select([*self.readers], [*self.writers], [], 0)
        for reader in reading:
            if reader in self.readers:
                reader.doRead()
        for writer in writing:
            if writer in self.writers:
                writer.doWrite()
        return bool(calls or reading or writing)


class Target:
    """The daemon; call it with what a client sends."""

    def __init__(self, directory: str) -> None:
        self._turns = Turns()
        settings = Settings(directories=directories_below(directory))
        builder: Any = FakeBuilder(lambda request: None)
        daemon = Daemon(self._turns, settings, inline, lambda *_: builder, os.environ)
        self._session = Reception(daemon).session
        self._store = StoreDirectory(settings.directories.store)
        self._failures: list[Any] = []
        globalLogPublisher.addObserver(self._observe)

    def _observe(self, event: dict[str, Any]) -> None:
        if "log_failure" in event:
            self._failures.append(event["log_failure"])

    def __call__(self, data: bytes) -> None:
        near, far = socket.socketpair()
        far.setblocking(False)
        over: list[Connection] = []
        connection = Connection(
            self._turns, near, self._session, store=self._store, closed=over.append
        )
        connection.start()
        with far:
            for _ in range(MOST_TURNS):
                if data:
                    try:
                        data = data[far.send(data) :]
                    except BlockingIOError:
                        pass
                    except OSError:
                        data = b""
                    if not data:
                        far.shutdown(socket.SHUT_WR)
                try:
                    while far.recv(1 << 20):
                        pass
                except OSError:
                    pass
                if not self._turns.turn() and not data:
                    break
            else:
                raise AssertionError("the connection is never done")
        connection.abort()
        while self._turns.turn():
            pass
        if self._failures:
            self._failures[0].raiseException()
        if not over:
            raise AssertionError("the connection does not end")


def seeds(store: StoreDirectory) -> list[bytes]:
    """Return what to begin with: one request of each kind of arguments."""
    path = store.child("0" * 32 + "-a")
    requests = [
        op.IsValidPath(path).encode(),
        op.QueryValidPaths((path,)).encode(),
        op.AddTextToStore("a", b"text", ()).encode(),
        op.AddToStore("a", True, True, "sha256").encode(),
        op.BuildPaths((path,)).encode(),
        op.CollectGarbage(0, (), False, 0).encode(),
        op.ImportPaths().encode() + encode_bytes(b"\1") + encode_bytes(b""),
        op.ClearFailedPaths(("*",)).encode(),
        op.VerifyStore(True, False).encode(),
    ]
    return [Greeting().encode() + request for request in requests]


def main() -> None:
    """Run the fuzzer with the arguments of the command line."""
    with tempfile.TemporaryDirectory() as directory:
        target = Target(os.path.realpath(directory))
        for seed in seeds(StoreDirectory(os.path.realpath(directory) + "/store")):
            target(seed)
        atheris.Setup(sys.argv, target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
