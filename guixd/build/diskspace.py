"""A minimum of free disk, below which no build begins."""

from __future__ import annotations

import os
from collections.abc import Iterable

LOOK = 10.0
"""Seconds between looks at a disk that is nearly full; nothing tells when it is not."""


class DiskSpace:
    """How much is free where builds write.

    :param least: bytes that must be free for unprivileged users; 0 for any.
    """

    def __init__(self, directories: Iterable[str], least: int) -> None:
        self._directories = tuple(directories)
        self._least = least

    def lack(self) -> str:
        """Return what is missing for a build to begin, as a client reads it; empty if nothing."""
        for directory in self._directories if self._least else ():
            status = os.statvfs(directory)
            free = status.f_bavail * status.f_frsize
            if free < self._least:
                return (
                    f"{free >> 20} MiB are free in '{directory}', and builds begin with"
                    f" {self._least >> 20} MiB or more (the daemon's option '--min-free-disk')"
                )
        return ""
