"""How many connections a user may have, and how long they may be silent (spec: protocol §12)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

from guixd.errors import GuixdError
from guixd.service.connection import Connection, Reactor
from guixd.settings import Settings

Who: TypeAlias = int | str
"""A user's id, or the address of a machine."""

SWEEPS = 8
"""How often in the longest idle time connections are looked at."""


class TooManyConnections(GuixdError):
    """A user has as many connections as one may have."""

    reason = "too-many-connections"


class Admission:
    """The limits of one daemon's connections; without limits nothing is counted.

    Who has too many is told so after the greeting.  Twice as many are closed at once,
    so that they cannot take all descriptors by greeting never.

    :param uid: the daemon's own user, for whom as for root there is no limit.
    """

    def __init__(self, reactor: Reactor, settings: Settings, uid: int) -> None:
        self._reactor = reactor
        self._most = settings.max_connections_per_user
        self._patience = settings.greeting_timeout
        self._idle = settings.idle_timeout
        self._trusted = (0, uid)
        self._owners: dict[Connection, Who] = {}
        self._counts: Counter[Who] = Counter()
        self._strangers: dict[Connection, float] = {}
        """Who has not greeted yet, and since when, in this order."""
        self._quiet: dict[Connection, float] = {}
        """Those without a request, and since when at least."""
        self._timers: dict[Callable[[], None], Any] = {}

    def enter(self, connection: Connection, address: Any) -> bool:
        """Whether CONNECTION may stay to greet; if so, `leave` is to follow.

        :param address: what `accept` gave.
        """
        who = connection.peer.uid if connection.peer is not None else str(address[0])
        if self._most and who not in self._trusted:
            if self._counts[who] >= 2 * self._most:
                return False
            self._counts[who] += 1
            self._owners[connection] = who
        if self._patience:
            self._strangers[connection] = self._reactor.seconds()
            self._later(self._patience, self._dismiss)
        if self._idle:
            self._quiet[connection] = self._reactor.seconds()
            self._later(self._idle / SWEEPS, self._sweep)
        return True

    def greeted(self, connection: Connection) -> None:
        """The greeting of CONNECTION has come.

        :raises TooManyConnections: its user has too many.
        """
        self._strangers.pop(connection, None)
        who = self._owners.get(connection)
        if who is not None and self._counts[who] > self._most:
            kind = "user" if isinstance(who, int) else "machine"
            raise TooManyConnections(
                f"{kind} {who} has {self._most} connections to the build daemon already;"
                " close some of them"
            )

    def leave(self, connection: Connection) -> None:
        """CONNECTION is over."""
        self._strangers.pop(connection, None)
        self._quiet.pop(connection, None)
        who = self._owners.pop(connection, None)
        if who is not None:
            self._counts[who] -= 1
            if not self._counts[who]:
                del self._counts[who]

    def stop(self) -> None:
        """Look at no connections any more."""
        timers, self._timers = self._timers, {}
        for timer in timers.values():
            timer.cancel()

    def _later(self, seconds: float, step: Callable[[], None]) -> None:
        if step not in self._timers:
            self._timers[step] = self._reactor.callLater(seconds, step)

    def _dismiss(self) -> None:
        """Close the connections of those who do not greet."""
        del self._timers[self._dismiss]
        now = self._reactor.seconds()
        for connection, since in list(self._strangers.items()):
            if since + self._patience > now:
                self._later(since + self._patience - now, self._dismiss)
                return
            del self._strangers[connection]
            connection.abort()

    def _sweep(self) -> None:
        """Close the connections that have been idle for too long."""
        del self._timers[self._sweep]
        now = self._reactor.seconds()
        for connection, since in list(self._quiet.items()):
            if not connection.was_idle():
                self._quiet[connection] = now
            elif since + self._idle <= now:
                connection.abort()
        if self._quiet:
            self._later(self._idle / SWEEPS, self._sweep)
