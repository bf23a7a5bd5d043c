"""Many readers behind one descriptor of the reactor.

What the reactor does around each `doRead` costs as much as a small request.  An epoll
descriptor is readable when one of its members is, so that the reactor needs to look
at one for all connections, which are then served directly, and again while they
have something: clients that wait for their replies have the next request soon.
"""

from __future__ import annotations

import select
from typing import Any, Final

from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

_log = Logger()

ROUNDS: Final = 8
"""How often the readers are looked at before the reactor may do something else."""
_AT_ONCE: Final = 64


@implementer(IReadDescriptor)
class ReadHub:
    """Stands for the reactor where connections ask to be read.

    :ivar addWriter: these are the reactor's own, like all that follow.
    """

    def __init__(self, reactor: Any) -> None:
        """Serve readers on REACTOR, an `IReactorFDSet` and `IReactorTime`."""
        self._reactor = reactor
        self._epoll = select.epoll()
        self._readers: dict[int, Any] = {}
        self._numbers: dict[Any, int] = {}
        self._added: set[int] = set()
        self.addWriter = reactor.addWriter
        self.removeWriter = reactor.removeWriter
        self.callLater = reactor.callLater

    def addReader(self, reader: Any) -> None:
        """Call `doRead` of READER when there is something to read; once is enough."""
        if reader in self._numbers:
            return
        number = reader.fileno()
        if not self._readers:
            self._reactor.addReader(self)
        self._epoll.register(number, select.EPOLLIN)
        self._readers[number] = reader
        self._numbers[reader] = number
        self._added.add(number)

    def removeReader(self, reader: Any) -> None:
        """Leave READER alone from now on; to be called before its descriptor is closed."""
        number = self._numbers.pop(reader, None)
        if number is None:
            return
        del self._readers[number]
        self._epoll.unregister(number)
        if not self._readers:
            self._reactor.removeReader(self)

    def fileno(self) -> int:
        """Return the epoll descriptor."""
        return self._epoll.fileno()

    def doRead(self) -> None:
        """Let those read who can."""
        for _ in range(ROUNDS):
            ready = self._epoll.poll(0, _AT_ONCE)
            if not ready:
                return
            self._added.clear()
            for number, _event in ready:
                reader = self._readers.get(number)
                # Who has come meanwhile may have the number of one who has gone.
                if reader is not None and number not in self._added:
                    self._read(reader)

    def _read(self, reader: Any) -> None:
        try:
            reader.doRead()
        except Exception:  # noqa: BLE001
            _log.failure("a reader failed")
            self.removeReader(reader)
            reader.connectionLost(Failure())  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure) -> None:
        """The reactor gives up all readers."""
        for reader in tuple(self._numbers):
            self.removeReader(reader)
            reader.connectionLost(reason)

    def logPrefix(self) -> str:
        """Name this in logs."""
        return "guixd"
