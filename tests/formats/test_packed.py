"""Lists of short strings, read and written at once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import GuixdError
from guixd.formats import packed, wire
from guixd.formats.path import StoreDirectory, StorePath

STORE = StoreDirectory("/s/t")
plain = st.text(st.characters(min_codepoint=1, max_codepoint=127), min_size=1, max_size=255)
names = st.text("abc.-", min_size=1, max_size=20)
odd = st.sampled_from(
    [
        "",
        "/s/t",
        "/s/t/",
        "/s/t/a/b",
        "/s/u/a",
        "x/s/t/a",
        "/s/t/a\0",
        "/s/t/é",
        "/s/t/" + "x" * 300,
    ]
)


def one_by_one(data: bytes) -> list[StorePath]:
    """Read a list as slowly as can be."""
    source = wire.Source(STORE)
    source.feed(data)
    count = source.word()
    assert isinstance(count, int)
    paths = []
    for _ in range(count):
        path = wire.PATH.resume(source)
        assert isinstance(path, StorePath)
        paths.append(path)
    return paths


def at_once(data: bytes) -> list[StorePath]:
    source = wire.Source(STORE)
    source.feed(data)
    paths = wire.PATHS_IN_ORDER.begin().resume(source)
    assert isinstance(paths, tuple)
    assert not len(source)
    return list(paths)


class PackedTests(SynchronousTestCase):
    @settings(deadline=None)
    @given(st.lists(plain, min_size=1, max_size=20), st.integers(0, 25), st.integers(0, 400))
    def test_short(self, texts: list[str], most: int, missing: int) -> None:
        """P5: as many as are whole and wanted are read; the writer gives the same bytes."""
        data = b"".join(map(wire.encode_string, texts))
        self.assertEqual(packed.encode_short(texts), data)
        cut = data[: max(0, len(data) - missing)]
        found, joined, used = packed.take_short(cut, most)
        self.assertEqual(found, texts[: len(found)])
        self.assertEqual(joined, "\0".join(found))
        self.assertEqual(used, len(b"".join(map(wire.encode_string, found))))
        if len(found) < min(most, len(texts)):
            self.assertGreater(used + len(wire.encode_string(texts[len(found)])), len(cut))

    @settings(deadline=None)
    @given(st.lists(names.map("/s/t/{}".format) | odd, max_size=6))
    def test_paths(self, texts: list[str]) -> None:
        """P5, P7: reading at once takes and refuses what reading one by one does."""
        data = wire.NAMES.encode(tuple(texts))
        try:
            expected = one_by_one(data)
        except GuixdError as error:
            self.assertRaises(type(error), at_once, data)
        else:
            self.assertEqual(at_once(data), expected)

    @settings(deadline=None)
    @given(st.lists(names, min_size=1, max_size=4), st.data())
    def test_wrong_byte(self, texts: list[str], draw: st.DataObject) -> None:
        """P5, P6: so it is with a byte changed, be it of a length, a name or the padding."""
        data = bytearray(wire.NAMES.encode(tuple(f"/s/t/{name}" for name in texts)))
        data[draw.draw(st.integers(8, len(data) - 1))] = draw.draw(st.integers(0, 255))
        try:
            expected = one_by_one(bytes(data))
        except GuixdError as error:
            self.assertRaises(type(error), at_once, bytes(data))
        except AssertionError:  # bytes are missing now
            self.assertRaises(AssertionError, at_once, bytes(data))
        else:
            source = wire.Source(STORE)
            source.feed(bytes(data))
            self.assertEqual(wire.PATHS_IN_ORDER.begin().resume(source), tuple(expected))

    def test_not_short(self) -> None:
        """P5: others are left to the careful writer and reader."""
        for text in "é", "x" * 256:
            self.assertIsNone(packed.encode_short([text]))
        for text in "", "a\0", "é", "x" * 256:
            data = wire.encode_string(text)
            self.assertEqual(packed.take_short(data, 1), ([], "", 0))
        self.assertEqual(packed.encode_short([]), b"")
