"""The time between the wish to stop and the end (spec: options §5)."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

QUIET = 1.0
"""Seconds without anything at work after which nobody is expected to ask for more."""


class Drain:
    """Lets what is at work come to its end.

    A client that gets its answer may have more requests before it has done what its
    user wants, so the end comes when nothing was at work for a moment.

    :param seconds: the longest time.
    :param busy: whether anything is at work.
    :ivar over: fires when it is time to end the rest.
    :ivar given_up: whether something was still at work then.
    """

    def __init__(self, clock: IReactorTime, seconds: float, busy: Callable[[], bool]) -> None:
        self.over: Deferred[None] = Deferred()
        self.given_up = False
        self._clock = clock
        self._busy = busy
        self._limit: IDelayedCall | None = None
        self._quiet: IDelayedCall | None = None
        if busy() and seconds > 0:
            self._limit = clock.callLater(seconds, self.hurry)
        else:
            self.hurry()

    def stirred(self) -> None:
        """Say that a piece of work has ended."""
        if self._quiet is not None:
            self._quiet.reset(QUIET)
        elif not self.over.called:
            self._quiet = self._clock.callLater(QUIET, self._look)

    def _look(self) -> None:
        self._quiet = None
        if not self._busy():
            self.hurry()

    def hurry(self) -> None:
        """Wait no longer."""
        if self.over.called:
            return
        for timer in self._limit, self._quiet:
            if timer is not None and timer.active():
                timer.cancel()
        self._quiet = None
        self.given_up = self._busy()
        self.over.callback(None)
