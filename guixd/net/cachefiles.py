"""The directory in which answers of substitute servers are kept (spec: substitutes §6).

Other programs keep theirs there, too, in the same form.  All functions block.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress

from guixd.formats import narinfocache
from guixd.formats.narinfo import MOST_BYTES
from guixd.formats.narinfocache import CacheEntry

HOUSEKEEPING = 5 * 24 * 3600
"""Seconds between two times that old files are removed."""
LONGEST_KEPT = 2 * 24 * 3600
"""Seconds after which a file is old, if it does not say that it is so earlier."""
_SKEW = 24 * 3600
"""Seconds by which clocks of who writes files may differ."""
_LATEST = "last-expiry-cleanup"
_LONGEST = 3 * MOST_BYTES
_HEAD = 4096
_DATES = re.compile(
    rb'\s*\(narinfo\s+\(version\s+[0-9]+\)\s*\(cache-uri\s+"(?:[^"\\]|\\.)*"\)'
    rb"\s*\(date\s+([0-9]{1,18})\)\s*\(ttl\s+([0-9]{1,18})\)",
    re.DOTALL,
)
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class CacheFiles:
    """The files below DIRECTORY, which is made when something is to be kept.

    What cannot be read or written is as if it were not there.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def read(self, uri: str, names: Iterable[str]) -> dict[str, CacheEntry]:
        """Return what is kept of the server URI for the hash parts NAMES, even if it is old."""
        found: dict[str, CacheEntry] = {}
        place = self._place(uri)
        if not os.path.isdir(place):
            return found
        for name in names:
            data = _start(f"{place}/{name}", _LONGEST + 1)
            entry = narinfocache.parse(data) if len(data) <= _LONGEST else None
            if entry is not None and entry.uri == uri:
                found[name] = entry
        return found

    def write(self, uri: str, entries: Mapping[str, CacheEntry]) -> None:
        """Keep ENTRIES, by hash part, of the server URI."""
        place = self._place(uri)
        try:
            os.makedirs(place, 0o755, exist_ok=True)
            for name, entry in entries.items():
                # Nobody else is to read a server's URL, which may have a password in it.
                replace_file(f"{place}/{name}", narinfocache.serialise(entry), 0o600)
        except OSError:
            pass  # a full or read-only disk is no reason not to go on

    def tidy(self, now: int) -> None:
        """Remove old files, unless somebody did so not long ago.

        :param now: seconds since the epoch.
        """
        try:
            fd = os.open(
                f"{self._directory}/{_LATEST}",
                os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o644,
            )
        except OSError:
            return
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            latest = os.read(fd, 32).strip()
            if latest.isdigit() and 0 <= now - int(latest) < HOUSEKEEPING:
                return
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(now).encode(), 0)
            for place in os.scandir(self._directory):
                if place.is_dir(follow_symlinks=False):
                    _expire(place.path, now)
        except OSError:
            pass
        finally:
            os.close(fd)

    def _place(self, uri: str) -> str:
        return f"{self._directory}/{narinfocache.directory_name(uri)}"


def _start(path: str, most: int) -> bytes:
    """Return the first MOST bytes of the file PATH, nothing if it cannot be read."""
    try:
        fd = os.open(path, _FLAGS)
    except OSError:
        return b""
    try:
        return os.read(fd, most)
    except OSError:
        return b""
    finally:
        os.close(fd)


def replace_file(path: str, data: bytes, mode: int = 0o644) -> None:
    """Make DATA the contents of the file PATH, which everybody may read, in one step."""
    temporary = f"{path}.{os.getpid()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _expire(place: str, now: int) -> None:
    """Remove what is old in the directory PLACE, and PLACE itself if that was all."""
    for file in os.scandir(place):
        # What is no file of ours, and will not go, does not keep the others.
        with suppress(OSError):
            if _expiry(file) < now:
                os.unlink(file.path)
    with suppress(OSError):
        os.rmdir(place)


def _expiry(file: os.DirEntry[str]) -> int:
    """Return when FILE is old; of what says nothing sensible its own age counts."""
    changed = int(file.stat(follow_symlinks=False).st_mtime)
    dates = None
    if file.is_file(follow_symlinks=False):
        dates = _DATES.match(_start(file.path, _HEAD))
    date = changed if dates is None else min(int(dates[1]), changed + _SKEW)
    return date + (LONGEST_KEPT if dates is None else min(int(dates[2]), LONGEST_KEPT))
