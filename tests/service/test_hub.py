"""Many readers behind one."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from guixd.service.hub import ROUNDS, ReadHub


class FakeReactor:
    """Knows its readers; the hub asks for nothing else here."""

    addWriter = removeWriter = callLater = None

    def __init__(self) -> None:
        self.readers: list[object] = []

    def addReader(self, reader: object) -> None:
        self.readers.append(reader)

    def removeReader(self, reader: object) -> None:
        self.readers.remove(reader)


class Reader:
    """One end of a socket pair; what it reads is given to a function."""

    def __init__(self, case: SynchronousTestCase, read: Callable[[bytes], object]) -> None:
        self.socket, self.other = socket.socketpair()
        self.socket.setblocking(False)
        case.addCleanup(self.socket.close)
        case.addCleanup(self.other.close)
        self._read = read
        self.lost: list[Failure] = []

    def fileno(self) -> int:
        return self.socket.fileno()

    def doRead(self) -> None:
        self._read(self.socket.recv(1))

    def connectionLost(self, reason: Failure) -> None:
        self.lost.append(reason)


class HubTests(SynchronousTestCase):
    """`ReadHub` on a reactor that only remembers."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.hub = ReadHub(self.reactor)
        self.seen: list[Any] = []

    def reader(self, read: Callable[[bytes], object] | None = None) -> Reader:
        reader = Reader(self, read or self.seen.append)
        self.hub.addReader(reader)
        return reader

    def test_reading(self) -> None:
        """Those who can read do so, as long as there is something."""
        one, other, silent = self.reader(), self.reader(), self.reader()
        one.other.send(b"aaa")
        other.other.send(b"b")
        self.hub.doRead()
        self.assertEqual(sorted(self.seen), [b"a", b"a", b"a", b"b"])
        self.assertEqual(silent.lost, [])

    def test_bounded(self) -> None:
        """One who always has something leaves the reactor its turn."""
        self.reader().other.send(b"x" * 100)
        self.hub.doRead()
        self.assertEqual(len(self.seen), ROUNDS)

    def test_in_the_reactor(self) -> None:
        """The reactor has the hub while there are readers; adding twice is adding once."""
        one, other = self.reader(), self.reader()
        self.hub.addReader(one)
        self.assertEqual(self.reactor.readers, [self.hub])
        for reader in one, other, other:
            self.hub.removeReader(reader)
        self.assertEqual(self.reactor.readers, [])
        self.hub.addReader(one)
        self.assertEqual(self.reactor.readers, [self.hub])

    def test_removed_in_between(self) -> None:
        """Who is removed by another in the same round does not read any more."""
        readers: list[Reader] = []

        def remove_all(data: bytes) -> None:
            self.seen.append(data)
            for reader in readers:
                self.hub.removeReader(reader)

        readers += [self.reader(remove_all), self.reader(remove_all)]
        for reader in readers:
            reader.other.send(b"x")
        self.hub.doRead()
        self.assertEqual(self.seen, [b"x"])

    def test_number_used_again(self) -> None:
        """What was ready for a closed descriptor is no news for the next of its number."""
        readers: list[Reader] = []

        def replace(other: int) -> None:
            self.seen.append("read")
            number = readers[other].fileno()
            self.hub.removeReader(readers[other])
            readers[other].socket.close()
            fresh = self.reader(lambda data: self.seen.append("fresh"))
            self.assertEqual(fresh.fileno(), number)

        readers += [self.reader(lambda _: replace(1)), self.reader(lambda _: replace(0))]
        for reader in readers:
            reader.other.send(b"x")
        self.hub.doRead()
        self.assertEqual(self.seen, ["read"])

    def test_failure(self) -> None:
        """A reader that fails is given up, and only that one."""
        failing = self.reader(lambda data: 1 // 0)
        fine = self.reader()
        for reader in failing, fine:
            reader.other.send(b"xy")
        self.hub.doRead()
        self.assertEqual(self.seen, [b"x", b"y"])
        self.assertEqual([failure.type for failure in failing.lost], [ZeroDivisionError])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_given_up(self) -> None:
        """When the reactor gives the hub up, so does the hub its readers."""
        readers = [self.reader(), self.reader()]
        reason = Failure(OSError())
        self.hub.connectionLost(reason)
        self.assertEqual([reader.lost for reader in readers], [[reason], [reason]])
        self.assertEqual(self.reactor.readers, [])
