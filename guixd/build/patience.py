"""How long the clients of one build wait for it, each by its own options (spec: build §5).

A client's limits count from when the builder starts or the client comes, whichever is
later.  Whoever runs out of patience goes alone; the last one takes the builder along.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from twisted.internet.interfaces import IReactorTime

from guixd.build.request import ClientOptions
from guixd.build.watchdog import Watchdog

_Who = TypeVar("_Who", bound=Hashable)


class Patience(Generic[_Who]):
    """The limits of all who wait for one build.

    :param gone: called with who has run out of patience, while others have not,
        and the reason.
    """

    def __init__(self, clock: IReactorTime, gone: Callable[[_Who, str], None]) -> None:
        self._clock = clock
        self._gone = gone
        self._waiting: dict[_Who, ClientOptions] = {}
        self._watchdogs: dict[_Who, Watchdog] = {}
        self._kill: Callable[[str], None] | None = None
        self._written = 0
        self._held = False

    def join(self, who: _Who, options: ClientOptions) -> None:
        """Let WHO wait, too."""
        self._waiting[who] = options
        if self._kill is not None:
            self._watch(who, options)

    def leave(self, who: _Who) -> None:
        """WHO does not wait any more."""
        self._waiting.pop(who, None)
        watchdog = self._watchdogs.pop(who, None)
        if watchdog is not None:
            watchdog.stop()

    # What the builder says.

    def begin(self, kill: Callable[[str], None]) -> None:
        """The builder has started.

        :param kill: ends it, for the reason that is passed.
        """
        self._kill = kill
        self._written = 0
        for who, options in self._waiting.items():
            self._watch(who, options)

    def heard(self, size: int) -> None:
        """It wrote SIZE bytes."""
        self._written += size
        for watchdog in tuple(self._watchdogs.values()):
            watchdog.heard(size)

    def hold(self, on: bool) -> None:
        """From now on it is held, or not."""
        self._held = on
        for watchdog in self._watchdogs.values():
            watchdog.hold(on)

    def end(self) -> None:
        """It has ended."""
        self._kill = None
        while self._watchdogs:
            self._watchdogs.popitem()[1].stop()

    def _watch(self, who: _Who, options: ClientOptions) -> None:
        watchdog = self._watchdogs[who] = Watchdog(
            self._clock,
            lambda reason: self._expire(who, reason),
            silence=options.max_silent_time,
            total=options.timeout,
            size=options.max_log_size,
        )
        if self._held:
            watchdog.hold(True)
        if self._written:
            watchdog.heard(self._written)

    def _expire(self, who: _Who, reason: str) -> None:
        if len(self._waiting) > 1:
            self.leave(who)
            self._gone(who, reason)
        elif self._kill is not None:
            self._kill(reason)
