"""Keeping collectors away from what a request uses (spec: gc §4)."""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from guixd.build.request import Roots
from guixd.build.turns import BUSY_RETRY
from guixd.errors import Busy
from guixd.formats.path import StorePath


class Protection:
    """The roots of a session, each added once.

    Who protects a path before looking whether it is valid can rely on the answer.
    """

    def __init__(self, clock: IReactorTime, roots: Roots) -> None:
        self._clock = clock
        self._roots = roots
        self._paths: set[StorePath] = set()

    async def add(self, path: StorePath) -> None:
        """Protect PATH, which need not be valid."""
        while path not in self._paths:
            try:
                self._roots.add(path)
            except Busy:  # a collector reads our roots at this moment
                await deferLater(self._clock, BUSY_RETRY)
            else:
                self._paths.add(path)
