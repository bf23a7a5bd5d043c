"""Primitive encodings."""

from __future__ import annotations

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import NotInStore, ProtocolError
from guixd.formats import wire
from guixd.formats.path import StorePath
from guixd.formats.wire import MORE, Kind, Source


def decode(kind: Kind[object], data: bytes) -> object:
    """Read one value from DATA, which must be used up."""
    source = Source()
    source.feed(data)
    value = kind.begin().resume(source)
    assert not len(source), "bytes are left"
    return value


class Encoding(SynchronousTestCase):
    """Known bytes."""

    def test_worked(self) -> None:
        """The examples of the protocol's description."""
        self.assertEqual(wire.encode_int(1).hex(), "0100000000000000")
        self.assertEqual(wire.encode_string("foo").hex(), "0300000000000000666f6f0000000000")
        self.assertEqual(wire.encode_string("12345678").hex(), "08000000000000003132333435363738")
        self.assertEqual(
            wire.NAMES.encode(("a", "bc")).hex(),
            "02000000000000000100000000000000610000000000000002000000000000006263000000000000",
        )

    def test_range(self) -> None:
        """Integers that do not fit are refused instead of cut."""
        self.assertEqual(wire.encode_int(0xFFFFFFFF).hex(), "ffffffff00000000")
        self.assertEqual(wire.encode_long(2**64 - 1).hex(), "f" * 16)
        for value in (-1, 1 << 32):
            self.assertRaises(ValueError, wire.encode_int, value)
        for value in (-1, 1 << 64):
            self.assertRaises(ValueError, wire.encode_long, value)

    def test_sets(self) -> None:
        """P11: sets are sorted by bytes and have no duplicates, both ways."""
        odd = b"\xff".decode("utf-8", "surrogateescape")
        self.assertEqual(
            wire.NAME_SET.encode(("b", odd, "\U0001f600", "\uffff", "a", "b")),
            wire.NAMES.encode(("a", "b", "\uffff", "\U0001f600", odd)),
        )
        self.assertEqual(decode(wire.NAME_SET, wire.NAMES.encode(("b", "a", "b"))), ("a", "b"))
        self.assertEqual(decode(wire.NAMES, wire.NAMES.encode(("b", "a", "b"))), ("b", "a", "b"))

    def test_flags(self) -> None:
        """P13: what counts as true: of a flag all but 0, of others 1 alone; written are 0 and 1."""
        for number, flag, one in ((0, False, False), (1, True, True), (2, True, False)):
            self.assertIs(decode(wire.FLAG, wire.encode_int(number)), flag)
            self.assertIs(decode(wire.ONE, wire.encode_int(number)), one)
        for kind in (wire.FLAG, wire.ONE):
            self.assertIs(decode(kind, wire.encode_int(2**32 - 1)), kind is wire.FLAG)
            for value in (False, True):
                self.assertEqual(kind.encode(value), wire.encode_int(int(value)))
            source = Source()
            source.feed(bytes(7))
            self.assertIs(kind.begin().resume(source), MORE)


class Strictness(SynchronousTestCase):
    """What is refused."""

    def test_high_bytes(self) -> None:
        """P5: an integer with a bit above the 32nd; of long integers they are data."""
        for position in range(4, 8):
            data = bytearray(8)
            data[position] = 1
            for kind in (wire.INT, wire.FLAG, wire.NAME, wire.NAMES, wire.PAIRS, wire.PATHS):
                self.assertRaises(ProtocolError, decode, kind, bytes(data))
            self.assertEqual(decode(wire.LONG, bytes(data)), 1 << 8 * position)

    def test_padding(self) -> None:
        """P6: each byte of padding must be zero."""
        good = wire.encode_string("abc")
        self.assertEqual(decode(wire.NAME, good), "abc")
        for position in range(11, 16):
            bad = bytearray(good)
            bad[position] = 1
            self.assertRaises(ProtocolError, decode, wire.NAME, bytes(bad))

    def test_not_in_store(self) -> None:
        """Store paths are direct children of the store."""
        self.assertEqual(
            decode(wire.PATH, wire.encode_string("/gnu/store/nope")), "/gnu/store/nope"
        )
        for path in ("", "/gnu/store", "/gnu/store/", "/gnu/store/a/b", "/tmp/a", "gnu/store/a"):
            self.assertRaises(NotInStore, decode, wire.PATH, wire.encode_string(path))
            self.assertRaises(NotInStore, decode, wire.PATHS, wire.NAMES.encode((path,)))

    def test_limits(self) -> None:
        """A string over its limit is refused as soon as its length is known."""
        for kind, limit in (
            (wire.NAME, 64 << 10),
            (wire.PATH, 64 << 10),
            (wire.OPTION, 1 << 20),
            (wire.TEXT, 256 << 20),
        ):
            self.assertIs(decode(kind, b""), MORE)
            source = Source()
            source.feed(wire.encode_int(limit))
            self.assertIs(kind.begin().resume(source), MORE)
            self.assertRaises(ProtocolError, decode, kind, wire.encode_int(limit + 1))

    def test_list_limit(self) -> None:
        """A list is bounded by its bytes."""
        self.patch(wire, "MAX_LIST", 100)
        decode(wire.NAMES, wire.NAMES.encode(("a",) * 6))
        self.assertRaises(ProtocolError, decode, wire.NAMES, wire.NAMES.encode(("a",) * 7))

    def test_promises(self) -> None:
        """Nothing is allocated because a length or count says that much will come."""
        for kind, head in (
            (wire.TEXT, wire.encode_int(256 << 20)),
            (wire.NAMES, wire.encode_int(2**32 - 1)),
            (wire.PATHS, wire.encode_int(2**32 - 1)),
        ):
            source = Source()
            source.feed(head + wire.encode_string("/gnu/store/a"))
            tracemalloc.start()
            try:
                self.assertIs(kind.begin().resume(source), MORE)
                source.settle()
                self.assertLess(tracemalloc.get_traced_memory()[1], 10_000)
            finally:
                tracemalloc.stop()


class Feeding(SynchronousTestCase):
    """Bytes in pieces."""

    @settings(deadline=None, max_examples=40)
    @given(
        st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=4),
        st.lists(st.integers(1, 30), min_size=1, max_size=8),
    )
    def test_pieces(self, pairs: list[tuple[str, str]], sizes: list[int]) -> None:
        """The value is the same however the bytes are cut, and the rest stays."""
        data = wire.PAIRS.encode(tuple(pairs)) + b"rest"
        source = Source()
        reader = wire.PAIRS.begin()
        value: object = MORE
        buffer = bytearray(64)
        at = turn = 0
        while at < len(data):
            piece = data[at : at + sizes[turn % len(sizes)]]
            at, turn = at + len(piece), turn + 1
            buffer[: len(piece)] = piece
            source.feed(buffer, len(piece))
            if value is MORE:
                value = reader.resume(source)
            source.settle()
            buffer[:] = bytes(64)
        self.assertEqual(value, tuple(pairs))
        self.assertEqual(source.rest(), b"rest")

    def test_linear(self) -> None:
        """What was read of a list is not read again when its bytes come one by one."""

        class Counting(Source):
            steps = 0

            def string(self, limit: int) -> wire.Data | wire.More:
                self.steps += 1
                return super().string(limit)

        source = Counting()
        reader = wire.NAMES.begin()
        data = wire.NAMES.encode(("x" * 1000,) * 60)
        value: object = MORE
        for index in range(len(data)):
            source.feed(data[index : index + 1])
            value = reader.resume(source)
            source.settle()
        self.assertEqual(value, ("x" * 1000,) * 60)
        self.assertLessEqual(source.steps, len(data) + 60)


class Paths(SynchronousTestCase):
    """Lists of store paths, which are read many at once where possible."""

    names = st.text("abc\u00e9\u4e00.-", min_size=1, max_size=20)

    @settings(deadline=None)
    @given(st.lists(names, max_size=30), st.lists(st.integers(1, 300), min_size=1))
    def test_pieces(self, names: list[str], sizes: list[int]) -> None:
        """P11: the usual form and others, in any pieces."""
        paths = [f"/gnu/store/{name}" for name in names]
        data = wire.NAMES.encode(paths)
        source, reader, value = Source(), wire.PATHS.begin(), MORE
        for size in sizes * (len(data) // sum(sizes) + 1):
            source.feed(data[:size])
            data = data[size:]
            value = reader.resume(source)
            source.settle()
            if value is not MORE:
                break
        self.assertEqual(value, tuple(sorted(set(paths))))
        self.assertEqual(wire.PATHS.encode(value), wire.NAME_SET.encode(paths))

    def test_wrong(self) -> None:
        """P5, P6, P7: what is wrong in the middle is found as if it came alone."""
        good = wire.encode_string("/gnu/store/good")
        for wrong in (
            *map(wire.encode_string, ("", "x", "/gnu/store", "/gnu/store/", "/gnu/store/a/b")),
            good[:-1] + b"x",
            good[:4] + b"\1" + good[5:],
            wire.encode_string("/gnu/store/" + "x" * wire.MAX_NAME),
        ):
            with self.assertRaises((NotInStore, ProtocolError)) as alone:
                decode(wire.PATH, wrong)
            with self.assertRaises(type(alone.exception)) as among:
                decode(wire.PATHS, wire.encode_int(3) + good + wrong + good)
            self.assertEqual(str(alone.exception), str(among.exception))

    def test_linear(self) -> None:
        """Paths of another form in between do not make each cost a look at all the rest."""
        looks = 0
        original = Source.paths

        def count(source: Source, most: int) -> list[StorePath]:
            nonlocal looks
            looks += 1
            return original(source, most)

        self.patch(Source, "paths", count)
        value = decode(wire.PATHS, wire.NAMES.encode(["/gnu/store/a", "/gnu/store/\u00e9"] * 50))
        self.assertEqual((len(value), looks), (2, 1))
