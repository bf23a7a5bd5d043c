"""What is to be built, for whom, and whether anybody still wants it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred

from guixd.build.broadcast import Broadcast
from guixd.build.patience import Patience
from guixd.build.request import BuildMode, ClientOptions
from guixd.formats.derivation import Derivation
from guixd.formats.path import StorePath

_T = TypeVar("_T")


class Interest:
    """Whether a build is still wanted, and what it waits for at the moment.

    :ivar lost: whether nobody wants it any more.
    """

    def __init__(self) -> None:
        self.lost = False
        self._waiting: Deferred[Any] | None = None

    def lose(self) -> None:
        """Say that nobody wants it any more, which ends the waiting."""
        self.lost = True
        if self._waiting is not None:
            self._waiting.cancel()

    def check(self) -> None:
        """Go on only if it is still wanted.

        :raises CancelledError: it is not.
        """
        if self.lost:
            raise CancelledError

    async def wait(self, start: Callable[[], Deferred[_T]]) -> _T:
        """Wait for what START begins, which may be given up in the middle.

        :raises CancelledError: it was.
        """
        self.check()
        self._waiting = waiting = start()
        try:
            return await waiting
        finally:
            self._waiting = None


@dataclass(frozen=True, slots=True)
class Job:
    """One derivation to build.

    :ivar say: tells all clients.
    :ivar patience: how long they wait.
    :ivar wishes: returns what they want now, see `options`.
    """

    path: StorePath
    drv: Derivation
    say: Broadcast
    patience: Patience[Any]
    wishes: Callable[[], ClientOptions]
    mode: BuildMode = BuildMode.NORMAL
    interest: Interest = field(default_factory=Interest)

    @property
    def options(self) -> ClientOptions:
        """Those of the client that came first, but for who gets a build tree that is kept."""
        return self.wishes()
