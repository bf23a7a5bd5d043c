"""The daemon's end of a socket."""

from __future__ import annotations

import random
import socket
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from guixd.errors import GuixdError, PathNotValid, ProtocolError, StoreError
from guixd.formats import operations as op
from guixd.formats.messages import (
    ANSWER,
    LAST,
    Greeting,
    encode_error,
    encode_next,
    encode_write,
)
from guixd.formats.path import StorePath
from guixd.formats.wire import encode_int, encode_string
from guixd.service import connection as module
from tests.service.peers import (
    BUILD,
    GREETED,
    IS_VALID,
    YES,
    Line,
    asynchronous,
    next_turn,
)


class Greetings(TestCase):
    """The handshake."""

    @asynchronous
    async def test_bytes(self) -> None:
        """P1: exact bytes, and the client's credentials are known."""
        line = Line(self)
        line.far.send(bytes.fromhex("6378696e00000000"))
        self.assertEqual(await line.far.read(16), ANSWER)
        self.assertIsNone(line.session)
        line.far.send(bytes.fromhex("640100000000000000000000000000000100000000000000"))
        self.assertEqual(await line.far.read(8), LAST)
        self.assertEqual(line.greeting, Greeting())
        self.assertIsNotNone(line.connection.peer)

    @asynchronous
    async def test_wrong_magic(self) -> None:
        """P2: closed without a byte."""
        for first in (b"GET / HTTP/1.0\r\n\r\n", encode_int(0), b"cxin\0\0\0\1"):
            line = Line(self)
            line.far.send(first)
            self.assertEqual(await line.far.rest(), b"")
            await line.closed
            self.assertIsNone(line.session)

    @asynchronous
    async def test_versions(self) -> None:
        """P3: clients of all minor and major versions get through, and their first request."""
        for minor in (0x00, 0x07, 0x0A, 0x0B, 0x0E, 0x60, 0x61, 0x64, 0xFF):
            for major in (0, 0x100, 0x200):
                line = Line(self)
                line.answers[op.BuildPaths] = lambda operation: YES
                greeting = Greeting(major | minor, None, True)
                line.far.send(greeting.encode(), BUILD.encode(minor))
                self.assertEqual(await line.far.read(GREETED + 16), ANSWER + LAST + LAST + YES)
                self.assertEqual(line.session.events, [BUILD])
                self.assertEqual(line.connection.minor, minor)

    @asynchronous
    async def test_processor(self) -> None:
        """A wish for a processor is ignored."""
        line = Line(self)
        await line.greet(Greeting(0x164, 3, False))
        self.assertEqual(line.greeting, Greeting(0x164, 3, False))

    @asynchronous
    async def test_refused(self) -> None:
        """P4: a failure of the session's start is told, with a status from minor 8 on."""
        for minor in (0, 7, 8, 0x64):

            def refuse(connection: object, greeting: object) -> None:
                raise StoreError("no store here")

            async def refuse_later(connection: object, greeting: object) -> None:
                raise StoreError("no store here")

            for factory in (refuse, refuse_later):
                line = Line(self, factory)
                line.far.send(Greeting(minor).encode())
                expected = ANSWER + encode_error("no store here", 1, minor)
                self.assertEqual(await line.far.rest(), expected)
                self.assertEqual(expected.endswith(YES), minor >= 8)
                await line.closed

    @asynchronous
    async def test_malformed(self) -> None:
        """P5: an integer of the handshake with a high byte."""
        line = Line(self)
        line.far.send(encode_int(0x6E697863), encode_int(0x164), b"\0\0\0\0\1\0\0\0")
        self.assertTrue((await line.far.rest()).startswith(ANSWER + b"ptxc"))

    @asynchronous
    async def test_left_meanwhile(self) -> None:
        """A client that leaves before its session has begun."""
        started: Deferred[None] = Deferred()
        fate: list[str] = []
        begun: Deferred[Any] = Deferred(lambda begun: fate.append("cancelled"))

        def begin(connection: object, greeting: object) -> Deferred[Any]:
            started.callback(None)
            return begun

        line = Line(self, begin)
        line.far.send(Greeting().encode())
        await started
        line.far.transport.abortConnection()
        await line.closed
        self.assertEqual(fate, ["cancelled"])


class Requests(TestCase):
    """Requests that are answered at once, or wrongly put."""

    @asynchronous
    async def test_pipelined(self) -> None:
        """Many requests in one piece are answered in order, and others get their turn."""
        line, other = Line(self), Line(self)
        await line.greet()
        await other.greet()
        order: list[str] = []

        def answer(operation: op.IsValidPath) -> bytes:
            order.append(operation.path)
            return encode_string(operation.path)

        line.answers[op.IsValidPath] = other.answers[op.IsValidPath] = answer
        names = [f"name{index:04}" for index in range(1000)]
        line.far.send(*(op.IsValidPath(name).encode() for name in names))
        other.far.send(op.IsValidPath("other").encode())
        expected = b"".join(LAST + encode_string(name) for name in names)
        self.assertEqual(await line.far.read(len(expected)), expected)
        await other.far.read(24)
        self.assertLess(order.index("other"), 1000)

    @asynchronous
    async def test_byte_by_byte(self) -> None:
        """A request that trickles in."""
        line = Line(self)
        line.answers[op.IsValidPath] = lambda operation: YES
        await line.greet()
        for byte in IS_VALID.encode():
            line.connection._source.feed(bytes([byte]))
            line.connection._process()
            line.connection._source.settle()
        self.assertEqual(await line.far.read(16), LAST + YES)
        self.assertEqual(line.session.events, [IS_VALID])

    @asynchronous
    async def test_quiet_errors(self) -> None:
        """P5, P6, P7, P8: malformed requests get an error, then the connection ends."""
        for raw, text in (
            *((encode_int(opcode), f"invalid operation {opcode}") for opcode in (0, 2, 15, 17, 99)),
            (op.FindRoots().encode()[:4] + b"\1\0\0\0", ""),
            (encode_int(9) + b"\0\0\0\0\0\0\0\1", ""),
            (encode_int(1) + encode_string("abc")[:-1] + b"\1", ""),
            (encode_int(3) + encode_string("/tmp/x"), "'/tmp/x' is not in the store"),
            (encode_int(1) + encode_int(0xFFFFFFFF), ""),
        ):
            line = Line(self)
            line.answers[op.IsValidPath] = lambda operation: YES
            await line.greet()
            line.far.send(IS_VALID.encode(), raw, IS_VALID.encode() * 3)
            answer = await line.far.rest()
            self.assertEqual(answer[:16], LAST + YES)
            self.assertEqual(answer[16:24], b"ptxc\0\0\0\0")
            self.assertIn(text.encode(), answer)
            self.assertEqual(answer[-8:], YES)
            await line.closed
            self.assertEqual(line.session.events, [IS_VALID, "disconnected"])

    @asynchronous
    async def test_work_errors(self) -> None:
        """P7: an error of the work leaves the connection usable; its status is told."""
        line = Line(self)
        answers: list[Any] = [PathNotValid("first"), YES, GuixdError("second"), YES]
        answers[2].status = 100

        def answer(operation: object) -> bytes:
            result = answers.pop(0)
            if isinstance(result, Exception):
                raise result
            return result  # type: ignore[no-any-return]

        async def later(operation: object) -> bytes:
            raise GuixdError("third")

        line.answers[op.IsValidPath] = answer
        line.answers[op.FindRoots] = later
        await line.greet()
        line.far.send(IS_VALID.encode() * 4, op.FindRoots().encode())
        expected = (
            encode_error("first") + LAST + YES + encode_error("second", 100) + LAST + YES
            + encode_error("third")
        )  # fmt: skip
        self.assertEqual(await line.far.read(len(expected)), expected)
        self.assertEqual(line.session.events, [IS_VALID] * 4 + [op.FindRoots()])

    @asynchronous
    async def test_session_ends_it(self) -> None:
        """P17: a session can refuse a request so that the connection ends."""
        line = Line(self)

        def refuse(operation: object) -> bytes:
            raise ProtocolError("you may not")

        line.answers[op.BuildPaths] = refuse
        await line.greet()
        line.far.send(BUILD.encode())
        self.assertEqual(await line.far.rest(), encode_error("you may not"))

    @asynchronous
    async def test_defects(self) -> None:
        """A defect of the daemon is logged and told; it never just hangs up."""
        for defect in (ZeroDivisionError("oops"), RecursionError("deep")):

            def fail(operation: object, defect: Exception = defect) -> bytes:
                raise defect

            async def fail_later(operation: object, defect: Exception = defect) -> bytes:
                raise defect

            for answer in (fail, fail_later, lambda operation: None):
                line = Line(self)
                line.answers[op.IsValidPath] = answer
                await line.greet()
                line.far.send(IS_VALID.encode())
                said = await line.far.rest()
                self.assertEqual(said[:8], b"ptxc\0\0\0\0")
                self.assertIn(b"internal error", said)
                await line.closed
                self.assertEqual(len(self.flushLoggedErrors()), 1)

    @asynchronous
    async def test_sees_the_error(self) -> None:
        """P8: a client that still sends much gets the message instead of a reset."""
        line = Line(self)
        await line.greet()
        line.far.send(encode_int(99), bytes(3_000_000))
        self.assertEqual(await line.far.rest(), encode_error("invalid operation 99"))

    @asynchronous
    async def test_truncated(self) -> None:
        """A client that leaves within a request, or half-closes after one."""
        line = Line(self)
        await line.greet()
        line.far.send(IS_VALID.encode()[:-3])
        line.far.transport.loseWriteConnection()
        self.assertEqual(await line.far.rest(), b"")
        await line.closed
        self.assertEqual(line.session.events, ["disconnected"])
        line = Line(self)
        line.answers[op.IsValidPath] = lambda operation: YES
        await line.greet()
        line.far.send(IS_VALID.encode() * 2)
        line.far.transport.loseWriteConnection()
        self.assertEqual(await line.far.rest(), (LAST + YES) * 2)
        await line.closed
        self.assertEqual(line.session.events, [IS_VALID, IS_VALID, "disconnected"])

    @asynchronous
    async def test_garbage(self) -> None:
        """Random words never do more than end their own connection."""
        generator = random.Random(5)
        good = Line(self)
        good.answers[op.IsValidPath] = lambda operation: YES
        await good.greet()
        for _ in range(20):
            line = Line(self)
            await line.greet()
            words = [generator.choice((0, 1, 3, 9, 19, 20, 31, 99, 2**31)) for _ in range(50)]
            line.far.send(*map(encode_int, words), generator.randbytes(100))
            line.far.transport.loseWriteConnection()
            await line.far.rest()
            await line.closed
            self.flushLoggedErrors(KeyError)
        good.far.send(IS_VALID.encode())
        self.assertEqual(await good.far.read(16), LAST + YES)


class Working(TestCase):
    """Requests that take time."""

    def begin(self) -> tuple[Line, Deferred[bytes], list[str]]:
        """Return a line on which a build is asked for, the build, and what became of it."""
        line = Line(self)
        fate: list[str] = []
        build: Deferred[bytes] = Deferred(lambda build: fate.append("cancelled"))
        line.answers[op.BuildPaths] = lambda operation: build
        line.answers[op.IsValidPath] = lambda operation: YES
        return line, build, fate

    @asynchronous
    async def test_log_and_reply(self) -> None:
        """Messages come at once, the reply when it is there."""
        line, build, _ = self.begin()
        await line.greet()
        line.far.send(BUILD.encode())
        while BUILD not in line.session.events:
            await next_turn()
        line.connection.next(b"one\n")
        self.assertEqual(await line.far.read(24), encode_next(b"one\n"))
        line.connection.next(b"two\n")
        line.connection.send(encode_write(b"data"))
        build.callback(YES)
        self.assertEqual(
            await line.far.read(64), encode_next(b"two\n") + encode_write(b"data") + LAST + YES
        )

    @asynchronous
    async def test_early_requests(self) -> None:
        """Requests that come during the work are served after it, in order."""
        line, build, _ = self.begin()
        await line.greet()
        line.far.send(BUILD.encode(), IS_VALID.encode())
        while BUILD not in line.session.events:
            await next_turn()
        line.far.send(IS_VALID.encode() * 2)
        await next_turn()
        self.assertEqual(line.session.events, [BUILD])
        build.callback(b"")
        self.assertEqual(await line.far.read(56), LAST + (LAST + YES) * 3)

    @asynchronous
    async def test_half_close(self) -> None:
        """P27: the end of the client's input during the work cancels it."""
        for leave in ("loseWriteConnection", "abortConnection"):
            line, _, fate = self.begin()
            await line.greet()
            line.far.send(BUILD.encode())
            while BUILD not in line.session.events:
                await next_turn()
            getattr(line.far.transport, leave)()
            await line.closed
            self.assertEqual(fate, ["cancelled"])
            self.assertEqual(line.session.events, [BUILD, "disconnected"])

    @asynchronous
    async def test_work_outlives_the_client(self) -> None:
        """The session hears of the end only when the cancelled work has cleaned up."""
        line = Line(self)
        cleaned: Deferred[None] = Deferred()
        cleaning: Deferred[None] = Deferred()

        async def build(operation: object) -> bytes:
            try:
                return await Deferred()
            finally:
                cleaning.callback(None)
                await cleaned
                line.connection.next(b"nobody hears this")

        line.answers[op.BuildPaths] = build
        await line.greet()
        line.far.send(BUILD.encode())
        line.far.transport.loseWriteConnection()
        await cleaning
        self.assertEqual(line.session.events, [BUILD])
        cleaned.callback(None)
        await line.closed
        self.assertEqual(line.session.events, [BUILD, "disconnected"])

    @asynchronous
    async def test_work_finds_out(self) -> None:
        """P27: when the work's own words tell that the client has gone, it is cancelled, too."""
        line, build, fate = self.begin()
        begun: Deferred[None] = Deferred()

        async def talk(operation: object) -> bytes:
            await begun
            line.far.transport.getHandle().shutdown(socket.SHUT_RDWR)
            line.connection.next(b"nobody hears this")
            return await build

        line.answers[op.BuildPaths] = talk
        await line.greet()
        line.far.send(BUILD.encode())
        while BUILD not in line.session.events:
            await next_turn()
        begun.callback(None)
        self.assertEqual(fate, [])
        await line.closed
        self.assertEqual(fate, ["cancelled"])

    @asynchronous
    async def test_flood(self) -> None:
        """Early data are kept up to a bound, and the client's leaving is still noticed."""
        line, _, fate = self.begin()
        await line.greet()
        line.far.send(BUILD.encode(), bytes(4_000_000))
        while line.connection._watch is None:
            await next_turn()
        self.assertLessEqual(len(line.connection._source), len(module._BUFFER))
        line.far.transport.abortConnection()
        await line.closed
        self.assertEqual(fate, ["cancelled"])

    @asynchronous
    async def test_flood_behind_large_replies(self) -> None:
        """The leaving is noticed, too, when reading had stopped before the work began."""
        line, _, fate = self.begin()
        line.answers[op.IsValidPath] = lambda operation: bytes(600_000)
        await line.greet()
        line.far.transport.pauseProducing()
        line.far.send(IS_VALID.encode(), BUILD.encode(), bytes(200_000))
        while line.connection._reading:
            await next_turn()
        line.far.transport.resumeProducing()
        while BUILD not in line.session.events:
            await next_turn()
        line.far.transport.abortConnection()
        await line.closed
        self.assertEqual(fate, ["cancelled"])

    @asynchronous
    async def test_flood_of_requests(self) -> None:
        """After the work, what was held back is read and served."""
        line, build, _ = self.begin()
        await line.greet()
        line.far.send(BUILD.encode(), IS_VALID.encode() * 10_000)
        while line.connection._watch is None:
            await next_turn()
        build.callback(b"")
        self.assertEqual(await line.far.read(8 + 160_000), LAST + (LAST + YES) * 10_000)

    @asynchronous
    async def test_abort(self) -> None:
        """P27: the daemon itself ends a connection."""
        line, _, fate = self.begin()
        await line.greet()
        line.far.send(BUILD.encode())
        while BUILD not in line.session.events:
            await next_turn()
        line.connection.abort()
        await line.closed
        self.assertEqual(fate, ["cancelled"])
        self.assertEqual(await line.far.rest(), b"")


class SlowReaders(TestCase):
    """Clients that do not read."""

    @asynchronous
    async def test_back_pressure(self) -> None:
        """The session is told to pause, waits, and nothing is lost."""
        line = Line(self)
        block = bytes(range(256)) * 256
        most = 0

        async def export(operation: object) -> bytes:
            nonlocal most
            for _ in range(200):
                line.connection.send(encode_write(block))
                most = max(most, line.connection.pending)
                await line.connection.drained()
            return YES

        line.answers[op.ExportPath] = export
        await line.greet()
        line.far.transport.pauseProducing()
        line.far.send(op.ExportPath(StorePath("/gnu/store/a"), True).encode())
        while line.connection.pending <= module.LOW_WATER:
            await next_turn()
        line.far.transport.resumeProducing()
        expected = encode_write(block) * 200 + LAST + YES
        self.assertEqual(await line.far.read(len(expected)), expected)
        self.assertLess(most, module.HIGH_WATER + len(block))

    @asynchronous
    async def test_notices(self) -> None:
        """Whoever cannot wait is told when to stop and when to go on."""
        line = Line(self)
        build: Deferred[bytes] = Deferred()
        line.answers[op.BuildPaths] = lambda operation: build
        await line.greet()
        line.far.send(BUILD.encode())
        while BUILD not in line.session.events:
            await next_turn()
        line.far.transport.pauseProducing()
        sent = 0
        while "paused" not in line.session.events:
            line.connection.next(b"x" * 1000)
            sent += 1
        self.assertGreater(line.connection.pending, module.HIGH_WATER)
        line.far.transport.resumeProducing()
        self.assertEqual(await line.far.read(sent * 1016), encode_next(b"x" * 1000) * sent)
        self.assertEqual(line.session.events, [BUILD, "paused", "resumed"])
        build.callback(b"")

    @asynchronous
    async def test_large_replies(self) -> None:
        """Replies above the mark go on by themselves if the client keeps up."""
        line = Line(self)
        line.answers[op.IsValidPath] = lambda operation: bytes(70_000)
        await line.greet()
        line.far.send(IS_VALID.encode() * 300)
        await line.far.read(300 * 70_008)

    @asynchronous
    async def test_replies_are_bounded(self) -> None:
        """A client that asks much and reads nothing makes no queue without end."""
        line = Line(self)
        line.answers[op.IsValidPath] = lambda operation: bytes(100_000)
        await line.greet()
        line.far.transport.pauseProducing()
        line.far.send(IS_VALID.encode() * 60)
        while line.connection.pending <= module.LOW_WATER:
            await next_turn()
        self.assertLess(line.connection.pending, module.HIGH_WATER + 200_000)
        self.assertLess(len(line.session.events), 30)
        line.far.transport.resumeProducing()
        await line.far.read(60 * 100_008)
