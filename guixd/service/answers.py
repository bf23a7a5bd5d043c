"""What a client answers to READ messages (spec: protocol §4).

A READ costs a round trip.  Where it is certain that more will be needed, several are
on their way at once; a client that answers one after the other does not notice.
"""

from __future__ import annotations

from typing import Final

from twisted.internet.defer import Deferred

from guixd.errors import ProtocolError
from guixd.formats.messages import encode_read
from guixd.formats.wire import MORE, Bytes, Source
from guixd.service.connection import EARLY_INPUT, Connection

READ_SIZE: Final = 32768
"""Most bytes of one answer."""
MOST_ASKED: Final = 24
"""How many answers may be on their way."""
MOST_WAITING: Final = 1024 * 1024
"""Bytes of answers that wait to be taken, from which no more are asked for."""
_READ: Final = encode_read(READ_SIZE)


class Answers:
    """The stream that a client gives in answers, from now until `finish`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._source = Source()
        self._reader = Bytes(READ_SIZE)
        self._asked = 0  # answers that are on their way
        self._sure = 0  # bytes that will be needed beyond those taken
        self._taken: list[bytes] = []
        self._size = 0
        self._ended = False
        self._error: ProtocolError | None = None
        self._waiter: Deferred[None] | None = None
        self._paused = False
        connection.take_over(self)

    def expect(self, size: int) -> None:
        """Say that at least SIZE bytes more will be needed than have been taken."""
        self._sure = size
        self._ask()

    async def take(self) -> bytes:
        """Return what has come, waiting for something; empty at the end of the input.

        :raises ProtocolError: an answer is malformed; the connection must end.
        """
        while not self._taken and not self._ended:
            if not self._asked:
                self._send(1)
            if not self._taken and not self._ended:
                await self._wait()
        data = b"".join(self._taken)
        self._taken.clear()
        self._sure = max(self._sure - self._size, 0)
        self._size = 0
        return data

    async def finish(self) -> None:
        """End this; wait for answers that are on their way, and drop them."""
        self._sure = 0
        while self._asked and self._error is None:
            await self._wait()
        self._connection.give_back(self._source.rest())

    async def _wait(self) -> None:
        """Wait for an answer, or what makes one impossible."""
        if self._error is None:
            self._waiter = Deferred()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            raise self._error

    def received(self, data: bytes) -> None:
        """Use DATA of the client."""
        self._source.feed(data)
        self._read()
        self._source.settle()
        self._ask()
        waiter = self._waiter
        if waiter is not None and not waiter.called and (self._answered or self._error):
            waiter.callback(None)

    def _read(self) -> None:
        """Read those answers that were asked for."""
        self._answered = False
        try:
            while self._asked:
                data = self._reader.resume(self._source)
                if data is MORE:
                    break
                self._asked -= 1
                self._answered = True
                self._ended = self._ended or not data
                if not self._ended:
                    self._taken.append(data)
                    self._size += len(data)
        except ProtocolError as error:
            self._error = error
        if not self._asked and len(self._source) > EARLY_INPUT and not self._paused:
            self._paused = True
            self._connection.pause()

    def _ask(self) -> None:
        """Ask for what is sure to be needed."""
        if self._ended or self._size >= MOST_WAITING:
            return
        certain = (self._sure - self._size) // READ_SIZE
        count = min(certain, MOST_ASKED) - self._asked
        if count > 0:
            self._send(count)

    def _send(self, count: int) -> None:
        self._asked += count
        self._connection.send(_READ * count)
        if len(self._source):
            self._read()
        if self._paused and self._asked:
            self._paused = False
            self._connection.resume()
