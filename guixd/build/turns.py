"""Long loops in the reactor's thread, in slices."""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

BUSY_RETRY = 0.1
"""Seconds until what another process has for a moment is tried again."""
SLICE = 0.005
"""Seconds of work before others get a turn."""


class Turns:
    """Lets others have their turn from time to time."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._began = clock.seconds()

    @property
    def over(self) -> bool:
        """Whether it is the turn of others; it is asked once, then a new turn begins."""
        now = self._clock.seconds()
        if now - self._began <= SLICE:
            return False
        self._began = now
        return True

    async def give(self) -> None:
        """Wait until the reactor has done what else it has to do, if it is time for it."""
        if self.over:
            await deferLater(self._clock, 0)
            self._began = self._clock.seconds()
