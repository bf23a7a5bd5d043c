"""Processes of the daemon's own that do one thing for it, and how their end is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer


@implementer(IReadDescriptor)
class Death:
    """Waits for the end of a process.

    :param pidfd: of the process; it becomes ours.
    """

    def __init__(self, reactor: IReactorFDSet, pidfd: int, ended: Callable[[], None]) -> None:
        self._reactor = reactor
        self._ended = ended
        self._descriptor = pidfd
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._descriptor

    def logPrefix(self) -> str:
        return "helper"

    def doRead(self) -> None:
        self.connectionLost(cast(Failure, None))
        self._ended()

    def connectionLost(self, reason: Failure) -> None:
        self._reactor.removeReader(self)
        os.close(self._descriptor)
        self._descriptor = -1
