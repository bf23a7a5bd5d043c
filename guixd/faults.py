"""Named points at which a test kills the daemon, as a power cut or a signal might.

`GUIXD_FAULT=NAME[:COUNT]` in the environment lets the process kill itself when it
reaches the point NAME for the COUNT-th time (the first by default).  Without that
variable a point is a call of a function that does nothing.  The names are those in
the calls, AREA.STATE each, where STATE tells what has just been done.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from typing import Final

VARIABLE: Final = "GUIXD_FAULT"
_environ: Final = os.environ.get(VARIABLE)


def _ignore(name: str, /) -> None:
    """Do nothing."""


class Fault:
    """Kills the process at one point.

    :ivar name: of the point; empty for none.
    """

    def __init__(self, wanted: str) -> None:
        self.arm(wanted)

    def arm(self, wanted: str) -> None:
        """Wait for another point from now on.

        :param wanted: NAME or NAME:COUNT; empty for none.
        :raises ValueError: COUNT is no number.
        """
        self.name, _, count = wanted.partition(":")
        self._left = int(count or 1)
        self._passes = itertools.count(1)  # one step even if threads pass at once

    def __call__(self, name: str, /) -> None:
        """Die, if this is the time."""
        if name == self.name and next(self._passes) == self._left:
            os.kill(os.getpid(), signal.SIGKILL)


fault: Final = None if _environ is None else Fault(_environ)
"""What `reached` asks; `None` unless the variable was set, be it empty, at the start."""

reached: Final[Callable[[str], None]] = fault or _ignore
"""Tell that the point NAME has been reached."""
