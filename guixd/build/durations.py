"""How long builds took, remembered by the names of their derivations.

The file is small, rarely written, and of no importance: what is wrong with it is
ignored.  Names have no hash in them, so that the next version of a package that is
called the same is expected to take as long as the last one.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from guixd.build.threads import Threads

_log = Logger()

USUAL = 1.0
"""Seconds of a build that is not known, or quicker; those are not remembered."""
MOST_NAMES = 4096
LARGEST_FILE = 1 << 20
LONGEST = 30 * 86400.0
WRITE_AFTER = 60.0
"""Seconds until what is new gets into the file."""


class Durations:
    """What is known; the newest names are kept.

    :param file: where it is kept.
    """

    def __init__(self, clock: IReactorTime, threads: Threads, file: str) -> None:
        self._clock = clock
        self._threads = threads
        self._file = file
        self._seconds: dict[str, float] = {}
        self._timer: IDelayedCall | None = None

    def load(self) -> None:
        """Begin to read the file in a thread."""
        self._threads(_read, self._file).addCallbacks(self._loaded, _ignore)

    def _loaded(self, known: dict[str, float]) -> None:
        self._seconds = {**known, **self._seconds}

    def of(self, name: str) -> float:
        """Return the seconds that a derivation of NAME is expected to take."""
        return self._seconds.get(name, USUAL)

    def note(self, name: str, seconds: float) -> None:
        """Say that a derivation of NAME took SECONDS."""
        before = self._seconds.pop(name, None)
        if seconds <= USUAL and before is None:
            return
        average = seconds if before is None else (seconds + before) / 2
        self._seconds[name] = round(min(max(average, USUAL), LONGEST), 1)
        if len(self._seconds) > MOST_NAMES:
            del self._seconds[next(iter(self._seconds))]
        if self._timer is None:
            self._timer = self._clock.callLater(WRITE_AFTER, self._write)

    def _write(self) -> None:
        self._timer = None
        self._threads(_write, self._file, dict(self._seconds)).addErrback(_ignore)

    def stop(self) -> None:
        """Write what is new, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._write()


def _ignore(failure: Any) -> None:
    _log.debug("durations of builds: {error}", error=failure.getErrorMessage())


def _read(file: str) -> dict[str, float]:
    """Return what FILE says; blocks.

    :raises OSError: or `ValueError`: it cannot be read or is damaged.
    """
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as opened:
        text = opened.read(LARGEST_FILE + 1)
    known = json.loads(text, parse_constant=_refuse) if len(text) <= LARGEST_FILE else None
    if not isinstance(known, dict):
        raise ValueError(f"'{file}' is damaged")
    pairs = [(n, s) for n, s in known.items() if type(s) in (int, float) and math.isfinite(s)]
    return {name: min(max(seconds, USUAL), LONGEST) for name, seconds in pairs[-MOST_NAMES:]}


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no duration")


def _write(file: str, known: dict[str, float]) -> None:
    """Put KNOWN into FILE in one step; blocks."""
    new = file + ".new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(new, flags, 0o644), "w") as opened:
        json.dump(known, opened)
    os.rename(new, file)
