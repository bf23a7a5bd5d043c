"""Narinfos and the files in which they are kept (spec: substitutes §4, §6, §10)."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadNarinfo
from guixd.formats import narinfocache
from guixd.formats.hashes import to_base32
from guixd.formats.narinfo import Download, Narinfo, parse
from guixd.formats.narinfocache import CacheEntry
from guixd.formats.path import StoreDirectory

STORE = StoreDirectory()
GOOD = "a" * 32 + "-good"
OTHER = "b" * 32 + "-other"
HASH = "sha256:" + to_base32(hashlib.sha256(b"good").digest())
SIGNED = f"StorePath: /gnu/store/{GOOD}\nNarHash: {HASH}\nNarSize: 120\nReferences: \n"
TAIL = "Signature: 1;host;c2ln\nURL: nar/gzip/x\nCompression: gzip\nFileSize: 99\n"


def read(text: str) -> Narinfo:
    return parse(text.encode(), STORE)


class Records(SynchronousTestCase):
    """Single narinfos."""

    def refused(self, text: str) -> None:
        self.assertRaises(BadNarinfo, read, text)

    def test_fields(self) -> None:
        """U1: all that is registered is read."""
        found = read(
            f"StorePath: /gnu/store/{GOOD}\nNarHash: {HASH}\nNarSize: 120\n"
            f"References: {OTHER} {GOOD}\nDeriver: {OTHER}.drv\n" + TAIL
        )
        self.assertEqual(found.path, f"/gnu/store/{GOOD}")
        self.assertEqual(found.nar_hash, hashlib.sha256(b"good").digest())
        self.assertEqual((found.algorithm, found.nar_size), ("sha256", 120))
        self.assertEqual(found.references, {f"/gnu/store/{OTHER}", f"/gnu/store/{GOOD}"})
        self.assertEqual(found.deriver, f"/gnu/store/{OTHER}.drv")
        self.assertEqual(found.downloads, (Download("nar/gzip/x", "gzip", 99),))
        self.assertEqual(found.signature, "1;host;c2ln")

    def test_the_signed_text(self) -> None:
        """U6: the text of the known vector has the known hash."""
        text = (
            f"StorePath: /gnu/store/{GOOD}\n"
            "NarHash: sha256:1dhm6dssrphhf4agc4fyi2f2lwxrdzz0fqx2ddfnc33zi0mnfxap\n"
            "NarSize: 120\nReferences: \n"
        )
        digest = hashlib.sha256(read(text + TAIL).signed).hexdigest().upper()
        self.assertEqual(digest, "FF12F747D137CC20576151720FB4B41C74C056BB2C3D407566007D0E7F84D925")

    def test_no_signature_over_part_of_it(self) -> None:
        """U3: what lacks a field before the signature counts as unsigned."""
        for name in ("StorePath", "NarHash", "NarSize", "References"):
            line = next(x for x in SIGNED.splitlines(True) if x.startswith(name))
            found = read(SIGNED.replace(line, "") + TAIL + line)
            self.assertEqual((found.signed, found.signature), (b"", ""), name)

    def test_the_unsigned_tail(self) -> None:
        """U4: what follows the signature says where to download, and nothing else."""
        found = read(SIGNED + TAIL + f"Deriver: {OTHER}.drv\n")
        self.assertIsNone(found.deriver)
        self.assertEqual(found.signed, SIGNED.encode())
        for line in SIGNED.splitlines(True):
            self.refused(SIGNED + TAIL + line)

    def test_duplicates(self) -> None:
        """Section 10: no second value, whether before or after the signature."""
        for line in SIGNED.splitlines(True):
            self.refused(line + SIGNED + TAIL)
            self.refused(SIGNED + TAIL + line)

    def test_missing_fields(self) -> None:
        """Section 10: a size must be there, like everything that is compared."""
        for line in SIGNED.splitlines(True):
            self.refused(SIGNED.replace(line, "") + TAIL)

    def test_hostile_names(self) -> None:
        """Section 10: paths and references are names of items and nothing else."""
        for name in (
            "../../etc/passwd", "x", "a" * 32, "a" * 32 + "-", "a" * 31 + "u-good", "A" * 32 + "-x",
            "a" * 32 + "-a/b", "a" * 32 + "-..\0", "a" * 32 + "-.x", "a" * 32 + "-" + "n" * 212,
            "a" * 32 + "-é", "a" * 32 + "_good", "/gnu/store/" + GOOD,
        ):  # fmt: skip
            self.refused(SIGNED.replace("References: ", f"References: {name}") + TAIL)
            self.refused(SIGNED.replace(GOOD, name) + TAIL)
            self.refused(SIGNED + f"Deriver: {name}\n" + TAIL)
        self.refused(SIGNED.replace("/gnu/store/", "/other/store/") + TAIL)
        self.refused(SIGNED.replace("/gnu/store/", "") + TAIL)

    def test_hostile_values(self) -> None:
        """Numbers and hashes have their own form only."""
        for size in ("", "-1", "+1", "0x10", "1e3", "\u0661", "1" * 19, "12 0"):
            self.refused(SIGNED.replace("120", size) + TAIL)
        for digest in ("", "sha256", "sha256:", HASH + "0", HASH[:-1], "md4:x", HASH.upper()):
            self.refused(SIGNED.replace(HASH, digest) + TAIL)
        self.refused("x" * (1 << 20) + ": 1\n" + SIGNED)
        self.refused("+ what is continued?\n" + SIGNED)
        self.refused("no field\n" + SIGNED)
        self.assertRaises(BadNarinfo, parse, b"X: \xff\n" + SIGNED.encode(), STORE)

    def test_very_many_lines(self) -> None:
        """What would take long to be read is refused at once; one long value is not."""
        for line in ("a: b\n", "+\n", "URL: x\n", "#\n"):
            self.refused(SIGNED + TAIL + line * 1000)
            self.refused(line * 1001 + SIGNED)
        many = " ".join(f"{'c' * 32}-{number}" for number in range(20_000))
        found = read(SIGNED.replace("References: ", f"References: {many}") + TAIL)
        self.assertEqual(len(found.references), 20_000)
        found = read(SIGNED.replace("References: ", f"References:\n+ {OTHER}\n+{GOOD}") + TAIL)
        self.assertEqual(found.references, {f"/gnu/store/{OTHER}", f"/gnu/store/{GOOD}"})

    def test_notation(self) -> None:
        """Comments, continuations and empty lines before; the end at an empty line."""
        found = read("\n\n# hello\nPriority: 3\n+ more\n" + SIGNED + TAIL + "\nStorePath: x\n")
        self.assertEqual(found.path, f"/gnu/store/{GOOD}")
        self.assertEqual(found.signature, "1;host;c2ln")

    def test_places(self) -> None:
        """U13: URLs and compressions go together in their order, sizes too or by their place."""
        found = read(
            SIGNED
            + "URL: a\nURL: b\nCompression: lzip\nCompression: none\nFileSize: 1\nFileSize: 2\n"
        )
        self.assertEqual(found.downloads, (Download("a", "lzip", 1), Download("b", "none", 2)))
        self.assertEqual(found.download_size, 1)
        one = "URL: {0}\nCompression: {0}\n"
        gzip, none, size = one.format("gzip"), one.format("none"), "FileSize: 1\n"
        for text, sizes in (
            (gzip + none + size, [None, 1]),
            (gzip + size + none, [1, None]),
            (size + gzip + none, [None, None]),
            (gzip + "FileSize: much\n" + none + size, [None, 1]),
        ):
            found = read(SIGNED + text)
            self.assertEqual([d.size for d in found.downloads], sizes, text)
            self.assertEqual(found.download_size, int(1 in sizes))
        self.assertEqual(read(SIGNED + "URL: a\n").downloads, (Download("a"),))
        self.refused(SIGNED + "URL: a\nURL: b\nCompression: none\n")

    def test_equivalence(self) -> None:
        """U5: the same path, hash, size and references; signatures and places do not matter."""
        good = read(SIGNED + TAIL)
        self.assertTrue(good.is_equivalent(read(SIGNED + "URL: elsewhere\n")))
        other_hash = "sha256:" + to_base32(hashlib.sha256(b"bad").digest())
        for old, new in (
            (GOOD, OTHER), (HASH, other_hash), ("120", "121"), ("s: ", f"s: {OTHER}"),
        ):  # fmt: skip
            self.assertFalse(good.is_equivalent(read(SIGNED.replace(old, new) + TAIL)), old)

    @given(st.binary(max_size=200))
    def test_garbage(self, data: bytes) -> None:
        """Whatever is read, it is a narinfo or an error."""
        for text in (data, SIGNED.encode() + data, data + SIGNED.encode()):
            try:
                found = parse(text, STORE)
            except BadNarinfo:
                continue
            self.assertTrue(found.signed == b"" or text.startswith(found.signed))


class Files(SynchronousTestCase):
    """Files of the cache."""

    STOCK = (
        rb'(narinfo (version 2) (cache-uri "http://x/") (date 1700000000) (ttl 129600)'
        rb' (value "StorePath: /gnu/store/a\nURL: \"\\\"\n"))'
    )

    def test_stock_files(self) -> None:
        """U15: what the stock client writes is read, and written the same."""
        entry = narinfocache.parse(self.STOCK)
        text = b'StorePath: /gnu/store/a\nURL: "\\"\n'
        self.assertEqual(entry, CacheEntry("http://x/", 1700000000, 129600, text))
        assert entry is not None
        self.assertEqual(narinfocache.serialise(entry), self.STOCK)

    def test_directory(self) -> None:
        """The known name of a server's directory."""
        self.assertEqual(
            narinfocache.directory_name("http://127.0.0.1:18099"),
            "yfdvxsftdrthtcgkf3u7vwk3oxfcf2daekv7vlzk7jwn7pglcv2q",
        )

    @given(st.text(), st.integers(0, 10**17), st.none() | st.text().map(str.encode))
    def test_round_trip(self, uri: str, date: int, value: bytes | None) -> None:
        """U15: any answer comes back as it was."""
        entry = CacheEntry(uri, date, 60, value)
        self.assertEqual(narinfocache.parse(narinfocache.serialise(entry)), entry)

    @given(st.binary(max_size=100), st.integers(0, 150), st.integers(0, 150))
    def test_garbage(self, data: bytes, start: int, end: int) -> None:
        """U15: garbage and other versions are ignored."""
        stock = self.STOCK
        narinfocache.parse(stock[:start] + data + stock[end:])
        self.assertIsNone(narinfocache.parse(data))
        self.assertIsNone(narinfocache.parse(stock.replace(b"version 2", b"version 3")))
        self.assertIsNone(narinfocache.parse(stock[:-1]))
