"""A connection that reads for a session: answers, streams, clients by TCP."""

from __future__ import annotations

import random
import socket

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import TestCase

from guixd.errors import GuixdError
from guixd.formats import operations as op
from guixd.formats.messages import (
    LAST,
    encode_error,
    encode_read,
)
from guixd.formats.wire import encode_bytes, encode_int
from guixd.service import connection as module
from guixd.service.answers import Answers
from tests.service.peers import ADD, IS_VALID, YES, Line, asynchronous, next_turn

LIST = encode_int(0)


class Reading(TestCase):
    """READ exchanges."""

    def line(self, got: list[bytes]) -> Line:
        """Return a line whose imports take answers up to an empty one, which is an error."""
        line = Line(self)

        async def import_(operation: object) -> bytes:
            answers = Answers(line.connection)
            try:
                while data := await answers.take():
                    got.append(data)
                    if data == b"end":
                        return LIST
                raise GuixdError("unexpected end of file")
            finally:
                await answers.finish()

        line.answers[op.ImportPaths] = import_
        line.answers[op.IsValidPath] = lambda operation: YES
        return line

    @asynchronous
    async def test_exchange(self) -> None:
        """P29: the client is asked for as much as is wanted."""
        got: list[bytes] = []
        line = self.line(got)
        await line.greet()
        line.far.send(op.ImportPaths().encode())
        for part in (b"abc", bytes(32768)):
            self.assertEqual(await line.far.read(16), encode_read(32768))
            line.far.send(encode_bytes(part))
        self.assertEqual(await line.far.read(16), encode_read(32768))
        # P30: an empty answer is an error of the work.
        line.far.send(encode_bytes(b""), IS_VALID.encode())
        expected = encode_error("unexpected end of file") + LAST + YES
        self.assertEqual(await line.far.read(len(expected)), expected)
        self.assertEqual(got, [b"abc", bytes(32768)])

    @asynchronous
    async def test_answers_at_once(self) -> None:
        """A client that sends its answers before it is asked."""
        got: list[bytes] = []
        line = self.line(got)
        await line.greet()
        answers = encode_bytes(b"ab") + encode_bytes(b"end")
        line.far.send(op.ImportPaths().encode(), answers, IS_VALID.encode())
        expected = encode_read(32768) * 2 + LAST + LIST + LAST + YES
        self.assertEqual(await line.far.read(len(expected)), expected)
        self.assertEqual(got, [b"ab", b"end"])

    @asynchronous
    async def test_ahead(self) -> None:
        """What is sure to be needed is asked for without waiting for each answer."""
        line = Line(self)

        async def import_(operation: object) -> bytes:
            answers = Answers(line.connection)
            answers.expect(3 * 32768 + 1)
            taken = [await answers.take()]
            await answers.finish()
            return encode_int(sum(map(len, taken)))

        line.answers[op.ImportPaths] = import_
        await line.greet()
        line.far.send(op.ImportPaths().encode())
        self.assertEqual(await line.far.read(48), encode_read(32768) * 3)
        # Those that are on their way when it ends are waited for.
        for _ in range(3):
            line.far.send(encode_bytes(bytes(32768)))
        reply = await line.far.read(16)
        self.assertEqual(reply[:8], LAST)

    @asynchronous
    async def test_malformed(self) -> None:
        """P6: too much or bad padding in an answer ends the connection."""
        for bad in (encode_bytes(bytes(32769)), encode_bytes(b"abc")[:-1] + b"\1"):
            line = self.line([])
            await line.greet()
            line.far.send(op.ImportPaths().encode())
            await line.far.read(16)
            line.far.send(bad)
            self.assertEqual((await line.far.rest())[:8], b"ptxc\0\0\0\0")

    @asynchronous
    async def test_malformed_before_asked(self) -> None:
        """P6: a bad answer that is there before the READ ends the connection, too."""
        line = self.line([])
        await line.greet()
        line.far.send(op.ImportPaths().encode(), encode_bytes(b"abc")[:-1] + b"\1")
        self.assertIn(b"ptxc\0\0\0\0", await line.far.rest())

    @asynchronous
    async def test_left(self) -> None:
        """A client that leaves instead of answering."""
        line = Line(self)
        fate: list[str] = []

        async def import_(operation: object) -> bytes:
            try:
                return await Answers(line.connection).take()
            except CancelledError:
                fate.append("cancelled")
                raise

        line.answers[op.ImportPaths] = import_
        await line.greet()
        line.far.send(op.ImportPaths().encode())
        await line.far.read(16)
        line.far.transport.loseWriteConnection()
        await line.closed
        self.assertEqual(fate, ["cancelled"])


class Taker:
    """Takes SIZE bytes of a stream and gives back the rest, later if asked."""

    def __init__(self, line: Line, size: int, *, wait: bool = False) -> None:
        self.line, self.size, self.wait = line, size, wait
        self.data = b""
        self.most = 0
        self.done: Deferred[bytes] = Deferred()

    def received(self, data: bytes) -> None:
        self.most = max(self.most, len(data))
        self.data += data
        if self.wait:
            self.line.connection.pause()
        elif len(self.data) >= self.size:
            self.finish()

    def finish(self) -> None:
        self.line.connection.give_back(memoryview(self.data)[self.size :])
        self.done.callback(encode_int(self.size))


class Streams(TestCase):
    """Raw data after a request."""

    def add(self, line: Line, size: int, *, wait: bool = False) -> list[Taker]:
        """Let op 7 take SIZE bytes."""
        takers: list[Taker] = []
        line.answers[op.IsValidPath] = lambda operation: YES

        def answer(operation: object) -> Deferred[bytes]:
            taker = Taker(line, size, wait=wait)
            takers.append(taker)
            line.connection.take_over(taker)
            return taker.done

        line.answers[op.AddToStore] = answer
        return takers

    @asynchronous
    async def test_within_one_piece(self) -> None:
        """P14: the next request follows directly after the stream."""
        line = Line(self)
        takers = self.add(line, 11)
        await line.greet()
        line.far.send((ADD.encode() + b"raw archive" + IS_VALID.encode()) * 3)
        expected = (LAST + encode_int(11) + LAST + YES) * 3
        self.assertEqual(await line.far.read(len(expected)), expected)
        self.assertEqual([taker.data[:11] for taker in takers], [b"raw archive"] * 3)

    @asynchronous
    async def test_large(self) -> None:
        """A stream of many blocks."""
        line = Line(self)
        data = random.Random(1).randbytes(3_000_000)
        takers = self.add(line, len(data))
        await line.greet()
        line.far.send(ADD.encode(), data, IS_VALID.encode())
        expected = LAST + encode_int(len(data)) + LAST + YES
        self.assertEqual(await line.far.read(len(expected)), expected)
        self.assertEqual(takers[0].data[: len(data)], data)
        self.assertLessEqual(takers[0].most, module.STREAM_BLOCK)

    @asynchronous
    async def test_pause(self) -> None:
        """A consumer that is busy gets nothing until it wants more."""
        line = Line(self)
        takers = self.add(line, 2_000_000, wait=True)
        await line.greet()
        line.far.send(ADD.encode(), bytes(2_000_000), IS_VALID.encode())
        while not takers or not takers[0].data:
            await next_turn()
        before = len(takers[0].data)
        for _ in range(20):
            await next_turn()
        self.assertEqual(len(takers[0].data), before)
        takers[0].wait = False
        line.connection.resume()
        expected = LAST + encode_int(2_000_000) + LAST + YES
        self.assertEqual(await line.far.read(len(expected)), expected)

    @asynchronous
    async def test_bad_stream(self) -> None:
        """P15: an error while the stream is taken over ends the connection."""
        line = Line(self)
        takers = self.add(line, 1000)
        await line.greet()
        line.far.send(ADD.encode(), b"bad")
        while not takers:
            await next_turn()
        takers[0].done.errback(GuixdError("no archive"))
        self.assertEqual(await line.far.rest(), encode_error("no archive"))

    @asynchronous
    async def test_left(self) -> None:
        """A client that leaves within the stream."""
        line = Line(self)
        takers = self.add(line, 1000)
        await line.greet()
        line.far.send(ADD.encode(), b"part")
        line.far.transport.loseWriteConnection()
        await line.closed
        self.assertEqual(takers[0].data, b"part")
        self.assertEqual(line.session.events, [ADD, "disconnected"])


class Remote(TestCase):
    """Clients by TCP."""

    @asynchronous
    async def test_refused_early(self) -> None:
        """P19: collecting by TCP is refused before the arguments are there."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            far = socket.create_connection(server.getsockname())
            near, _ = server.accept()
        line = Line(self, sockets=(near, far))
        self.assertEqual(near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), 1)
        await line.greet()
        self.assertIsNone(line.connection.peer)
        line.far.send(encode_int(20))
        self.assertEqual((await line.far.rest())[:8], b"ptxc\0\0\0\0")
