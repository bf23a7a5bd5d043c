"""Waiting for lock files that another process holds (spec: build §4).

Whoever gives such a lock up closes the file, or removes it: of both the kernel tells
who watches it.  A slow look at the files from time to time is for file systems where it
does not, and for when no more watches are to be had.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure
from zope.interface import implementer

from guixd.store.locks import is_locked

LOOK = 1.0
"""Seconds between looks without watches."""
SLOW_LOOK = 10.0
"""Seconds between looks with watches."""
SETTLE = 0.01
"""Seconds after which a lock that is free is tried; its holder may be about to remove it."""
_IN_CLOSE_WRITE, _IN_DELETE_SELF, _IN_DONT_FOLLOW = 8, 0x400, 0x0200_0000
_libc = ctypes.CDLL(None, use_errno=True)


def released(reactor: Any, files: Collection[str]) -> Deferred[None]:
    """Wait until none of the lock FILES is locked any more; cancel the Deferred to give up.

    Others may be quicker than the caller, who then has to wait again.

    :param reactor: an `IReactorTime`, with watches if it is an `IReactorFDSet`, too.
    """
    return _Wait(reactor, files).free


class _Wait:
    def __init__(self, reactor: Any, files: Collection[str]) -> None:
        self.free: Deferred[None] = Deferred(lambda _: self._stop())
        self._reactor = reactor
        self._files = files
        self._found: Any = None
        self._watches: _Watches | None = None
        if IReactorFDSet.providedBy(reactor):
            try:
                self._watches = _Watches(reactor, self._look)
            except OSError:
                pass
        self._looking = LoopingCall(self._look)
        self._looking.clock = reactor
        self._looking.start(LOOK if self._watches is None else SLOW_LOOK)

    def _look(self) -> None:
        if self._found is not None:
            return
        if self._watches is not None:
            self._watches.watch(self._files)  # again, as there may be new files of the names
        if not any(map(is_locked, self._files)):
            self._found = self._reactor.callLater(SETTLE, self._fire)

    def _fire(self) -> None:
        self._found = None
        self._stop()
        self.free.callback(None)

    def _stop(self) -> None:
        if self._looking.running:
            self._looking.stop()
        if self._found is not None:
            self._found.cancel()
        if self._watches is not None:
            self._watches.close()


@implementer(IReadDescriptor)
class _Watches:
    """Calls back when a file that is watched was closed by one who could write, or is gone."""

    def __init__(self, reactor: Any, happened: Callable[[], None]) -> None:
        self._descriptor: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "no more watches")
        self._reactor = reactor
        self._happened = happened
        reactor.addReader(self)

    def watch(self, files: Collection[str]) -> None:
        """Watch those of FILES that exist; what is watched already stays so."""
        for file in files:
            mask = _IN_CLOSE_WRITE | _IN_DELETE_SELF | _IN_DONT_FOLLOW
            _libc.inotify_add_watch(self._descriptor, os.fsencode(file), mask)

    def close(self) -> None:
        """Watch no more."""
        self._reactor.removeReader(self)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def fileno(self) -> int:
        return self._descriptor

    def logPrefix(self) -> str:
        return "locks"

    def doRead(self) -> None:
        os.read(self._descriptor, 65536)
        self._happened()

    def connectionLost(self, reason: Failure) -> None:
        self.close()
