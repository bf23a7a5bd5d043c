"""A minimum of free disk, below which no build begins."""

from __future__ import annotations

import os
from collections.abc import Iterable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

LOOK = 10.0
"""Seconds between looks at a disk that is nearly full; of what others remove nothing tells."""
BYTES_PER_FILE = 128 << 10
"""For so many bytes of the minimum there must also be room for one more file."""


def free_bytes(place: str | int) -> int:
    """Return how many bytes users may still write to the file system of PLACE."""
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


class DiskSpace:
    """How much is free where builds write, and who waits for more.

    :param least: bytes that must be free for unprivileged users; 0 for any.
    """

    def __init__(self, clock: IReactorTime, directories: Iterable[str], least: int) -> None:
        self._clock = clock
        self._directories = tuple(directories)
        self._least = least
        self._waiting: dict[Deferred[None], None] = {}
        self._timer: IDelayedCall | None = None

    def lack(self) -> str:
        """Return what is missing for a build to begin, as a client reads it; empty if nothing."""
        if not self._least:
            return ""
        option = "(the daemon's option '--min-free-disk'); `guix gc' frees space in the store"
        files = self._least // BYTES_PER_FILE
        for directory in self._directories:
            status = os.statvfs(directory)
            free = status.f_bavail * status.f_frsize
            if free < self._least:
                return (
                    f"{free >> 20} MiB are free in '{directory}', and builds begin with"
                    f" {self._least >> 20} MiB or more {option}"
                )
            if status.f_files and status.f_favail < files:  # some file systems have no such limit
                return (
                    f"there is room for {status.f_favail} files in '{directory}', and builds begin"
                    f" with room for {files} or more {option}"
                )
        return ""

    def more(self) -> Deferred[None]:
        """Wait until nothing may be missing any more; cancel the Deferred to give up."""
        waiter: Deferred[None] = Deferred(self._leave)
        self._waiting[waiter] = None
        if self._timer is None:
            self._timer = self._clock.callLater(LOOK, self._look)
        return waiter

    def changed(self) -> None:
        """See whether enough is free now, as something was removed."""
        if self._waiting and not self.lack():
            self.wake()

    def wake(self) -> None:
        """Let all who wait see for themselves."""
        waiting, self._waiting = self._waiting, {}
        self._rest()
        for waiter in waiting:
            waiter.callback(None)

    def _look(self) -> None:
        self._timer = self._clock.callLater(LOOK, self._look)
        self.changed()

    def _leave(self, waiter: Deferred[None]) -> None:
        self._waiting.pop(waiter, None)
        if not self._waiting:
            self._rest()

    def _rest(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()
