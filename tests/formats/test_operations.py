"""Requests and replies."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import GuixdError, NotAllowed, NotInStore, ProtocolError
from guixd.formats import operations as op
from guixd.formats import wire
from guixd.formats.operations import OPERATIONS, Requests, encode_reply, reply_kind
from guixd.formats.wire import MORE, Source, encode_int, encode_string
from tests.formats.protocol import minors, path, requests, values_of

HELLO = path("hello.txt")


def decode(data: bytes, minor: int = 0x64) -> list[op.Operation[Any]]:
    """Read all requests in DATA, which must be used up."""
    source = Source()
    source.feed(data)
    decoder = Requests(source, minor)
    found = []
    while (request := decoder.next()) is not None:
        found.append(request)
    assert not len(source), "bytes are left"
    return found


class Decoding(SynchronousTestCase):
    """From bytes to requests."""

    def test_opcodes(self) -> None:
        """P8: exactly the assigned numbers are known."""
        self.assertEqual(
            sorted(OPERATIONS),
            [1, *range(3, 15), 16, *range(18, 36), 80, 81],
        )
        for opcode in (0, 2, 15, 17, 36, 79, 82, 99, 2**32 - 1):
            error = self.assertRaises(ProtocolError, decode, encode_int(opcode))
            self.assertEqual(error.text, f"invalid operation {opcode}")

    def test_add_text(self) -> None:
        """The worked exchange of the protocol's description."""
        raw = (
            "0800000000000000" "0900000000000000" "68656c6c6f2e747874" "00000000000000"
            "0e00000000000000" "48656c6c6f2c2073746f7265210a" "0000" "0000000000000000"
        )  # fmt: skip
        request = op.AddTextToStore("hello.txt", b"Hello, store!\n", ())
        self.assertEqual(decode(bytes.fromhex(raw)), [request])
        self.assertEqual(request.encode().hex(), raw)
        self.assertEqual(
            encode_reply(request, HELLO).hex(),
            (encode_int(53) + HELLO.encode() + bytes(3)).hex(),
        )

    def test_collect(self) -> None:
        """The worked request to delete everything dead."""
        raw = "14000000000000000200000000000000" + "0" * 32 + "f" * 16 + "0" * 48
        request = op.CollectGarbage(2, (), False, 2**64 - 1)
        self.assertEqual(decode(bytes.fromhex(raw)), [request])
        self.assertEqual(request.encode().hex(), raw)
        self.assertEqual(decode(bytes.fromhex(raw[:-32]), 4), [request])

    def test_path_kinds(self) -> None:
        """P7: a path outside the store is refused while reading, but not for op 1."""
        outside = encode_string("/tmp/x")
        self.assertEqual(decode(encode_int(1) + outside), [op.IsValidPath("/tmp/x")])
        for opcode in (3, 4, 5, 6, 10, 11, 16, 18, 22, 26, 28, 33):
            self.assertRaises(NotInStore, decode, encode_int(opcode) + outside)
        for opcode in (9, 30, 31, 32):
            self.assertRaises(NotInStore, decode, encode_int(opcode) + encode_int(1) + outside)
        for opcode in (12, 21):
            self.assertEqual(len(decode(encode_int(opcode) + outside)), 1)
        self.assertEqual(len(decode(encode_int(25) + encode_int(1) + outside)), 1)

    def test_duplicates(self) -> None:
        """P11: sets of paths come sorted and without duplicates."""
        raw = encode_int(31) + wire.NAMES.encode((path("b"), path("a"), path("b")))
        self.assertEqual(decode(raw), [op.QueryValidPaths((path("a"), path("b")))])

    def test_add_methods(self) -> None:
        """P12, P13: only 1 means fixed or recursive, and what is not fixed is sha256 of the NAR."""
        for fixed, recursive, algorithm, expected in (
            (0, 0, "nonsense", op.AddToStore("n", False, True, "sha256")),
            (2, 0, "md5", op.AddToStore("n", False, True, "sha256")),
            (1, 0, "sha1", op.AddToStore("n", True, False, "sha1")),
            (1, 1, "sha512", op.AddToStore("n", True, True, "sha512")),
            (1, 2, "sha512", op.AddToStore("n", True, False, "sha512")),
        ):
            raw = (
                encode_int(7)
                + encode_string("n")
                + encode_int(fixed)
                + encode_int(recursive)
                + encode_string(algorithm)
            )
            (request,) = decode(raw)
            self.assertEqual(request, expected)
            assert isinstance(request, op.AddToStore)
            self.assertEqual(request.recursive, expected.recursive)
            self.assertEqual(request.algorithm, expected.algorithm)

    def test_rest(self) -> None:
        """After op 7 the source is where the archive begins, and goes on where it ends."""
        source = Source()
        decoder = Requests(source)
        source.feed(op.AddToStore("n", True, True, "md5").encode() + b"archive")
        self.assertIsInstance(decoder.next(), op.AddToStore)
        self.assertEqual(source.rest(), b"archive")
        source.feed(op.FindRoots().encode())
        self.assertEqual(decoder.next(), op.FindRoots())

    def test_refused(self) -> None:
        """P19: an operation can be refused before its arguments have come."""
        source = Source()
        decoder = Requests(source, refused={20: "not for you"})
        source.feed(op.FindRoots().encode() + encode_int(20))
        self.assertEqual(decoder.next(), op.FindRoots())
        self.assertEqual(self.assertRaises(NotAllowed, decoder.next).text, "not for you")

    def test_gates(self) -> None:
        """P3: which fields of options come depends on the client's minor version."""
        first = ["keep_failed", "keep_going", "try_fallback", "verbosity"]
        old = ["max_jobs", "max_silent_time"]
        log = ["build_verbosity", "log_type", "print_build_trace"]
        for minor, names in (
            (0x00, first + old),
            (0x02, first + old + ["use_offload"]),
            (0x04, first + old + ["use_offload"] + log),
            (0x06, first + old + ["use_offload"] + log + ["build_cores"]),
            (0x0A, first + old + ["use_offload"] + log + ["build_cores", "use_substitutes"]),
            (
                0x60,
                first + old + ["use_offload"] + log + ["build_cores", "use_substitutes", "pairs"],
            ),
            (0x61, first + ["use_offload"] + log + ["use_substitutes", "pairs"]),
            (0xFF, first + ["use_offload"] + log + ["use_substitutes", "pairs"]),
        ):
            raw = encode_int(19) + b"".join(
                encode_int(0 if name == "pairs" else 1) for name in names
            )
            (options,) = decode(raw, minor)
            for name in op.SetOptions.__dataclass_fields__:
                value = getattr(options, name)
                if name == "pairs":
                    self.assertEqual(value, ())
                else:
                    self.assertEqual(value, 1 if name in names else None, (minor, name))
        self.assertEqual(decode(encode_int(9) + encode_int(0), 14), [op.BuildPaths((), 0)])
        self.assertEqual(
            decode(encode_int(9) + encode_int(0) + encode_int(2), 15), [op.BuildPaths((), 2)]
        )

    def test_malformed(self) -> None:
        """P5, P6: each high byte and each byte of padding of a request is looked at."""
        good = op.BuildPaths((HELLO,), 0).encode()
        decode(good)
        for position in (4, 12, 20, 23, 77, 79, 84):
            bad = bytearray(good)
            bad[position] = 1
            self.assertRaises(ProtocolError, decode, bytes(bad))

    @settings(deadline=None, max_examples=60)
    @given(st.lists(requests, min_size=1, max_size=3))
    def test_round_trip(self, made: list[tuple[int, op.Operation[Any]]]) -> None:
        """Every request comes out as it went in, also byte by byte."""
        minor = made[0][0]
        values = [value for other, value in made if other == minor]
        data = b"".join(value.encode(minor) for value in values)
        self.assertEqual(decode(data, minor), values)
        source = Source()
        decoder = Requests(source, minor)
        found = []
        for index in range(len(data)):
            source.feed(data[index : index + 1])
            request = decoder.next()
            source.settle()
            if request is not None:
                found.append(request)
        self.assertEqual(found, values)

    @settings(deadline=None, max_examples=150)
    @given(st.binary(max_size=200), minors)
    def test_garbage(self, data: bytes, minor: int) -> None:
        """Nothing but the daemon's own errors comes of garbage."""
        words = bytes(b if i % 8 == 0 else 0 for i, b in enumerate(data))
        for raw in (data, words):
            source = Source()
            source.feed(raw)
            decoder = Requests(source, minor)
            try:
                while decoder.next() is not None:
                    pass
            except GuixdError as error:
                self.assertTrue(error.text)


class Replies(SynchronousTestCase):
    """From replies to bytes and back."""

    @settings(deadline=None, max_examples=60)
    @given(
        minors.flatmap(
            lambda minor: st.tuples(
                st.just(minor),
                st.sampled_from(sorted(OPERATIONS)).flatmap(
                    lambda opcode: st.tuples(
                        st.just(opcode), values_of(reply_kind(opcode, minor), minor)
                    )
                ),
            )
        )
    )
    def test_round_trip(self, made: tuple[int, tuple[int, Any]]) -> None:
        """Every reply comes out as it went in, also byte by byte."""
        minor, (opcode, value) = made
        kind = reply_kind(opcode, minor)
        data = kind.encode(value)
        source = Source()
        source.feed(data)
        self.assertEqual(kind.begin().resume(source), value)
        self.assertEqual(len(source), 0)
        reader = kind.begin()
        found: object = MORE
        for index in range(len(data)):
            self.assertIs(found, MORE)
            source.feed(data[index : index + 1])
            found = reader.resume(source)
            source.settle()
        if data:
            self.assertEqual(found, value)

    def test_forms(self) -> None:
        """Replies as the protocol's description has them."""
        one, zero = encode_int(1), encode_int(0)
        self.assertEqual(encode_reply(op.IsValidPath("x"), True), one)
        self.assertEqual(encode_reply(op.IsValidPath("x"), False), zero)
        self.assertEqual(encode_reply(op.AddTempRoot(HELLO), None), one)
        self.assertEqual(encode_reply(op.SetOptions(False, False, False, 0), None), b"")
        self.assertEqual(encode_reply(op.QueryDeriver(HELLO), None), zero)
        self.assertEqual(
            encode_reply(op.QueryReferrers(HELLO), (path("b"), path("a"), path("b"))),
            encode_int(2) + encode_string(path("a")) + encode_string(path("b")),
        )
        info = op.SubstitutableInfo(None, (), 7, 9)
        question = op.QuerySubstitutablePathInfo("x")
        self.assertEqual(encode_reply(question, None), zero)
        self.assertEqual(
            encode_reply(question, info), one + zero + zero + encode_int(7) + encode_int(9)
        )
        self.assertEqual(encode_reply(question, info, 6), one + zero + zero + encode_int(7))
