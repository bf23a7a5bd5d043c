"""Where archives can be had, and whose narinfos count."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.formats import narinfo, sexp
from guixd.formats.path import StoreDirectory
from guixd.net import judging
from guixd.net.judging import Judge, is_authorised
from guixd.net.places import Source, places
from guixd.net.reach import Reach
from guixd.signatures import Acl
from tests.signatures.keys import configuration
from tests.support import temporary_directory

STORE = StoreDirectory("/gnu/store")
ITEM = "a" * 32 + "-good"
HASH = "1dhm6dssrphhf4agc4fyi2f2lwxrdzz0fqx2ddfnc33zi0mnfxap"
SIGNED = f"StorePath: /gnu/store/{ITEM}\nNarHash: sha256:{HASH}\nNarSize: 120\nReferences: \n"
# A throw-away key, and its signature of the sha256 of SIGNED.
KEY = "905E134890E16BAD130A55BD2079BE3C44D3246E31466ABD3C771BE338D1EAEB"
R = "094C6C7DF70C875F3180C904E9F81B0123B77F562265A14A4D3904361FF5358E"
S = "0B23A5B6E8BB76D8B2B197144996DB4FA95ECB0D9937C22A9EFE5404CA94FA1E"
PUBLIC = f"(public-key (ecc (curve Ed25519) (q #{KEY}#)))"


def signature(digest: str, r: str = R, s: str = S) -> bytes:
    return (
        f"(signature (data (flags rfc6979) (hash sha256 #{digest}#))"
        f" (sig-val (ecdsa (r #{r}#) (s #{s}#))) {PUBLIC})"
    ).encode()


def said(signed: str, text: bytes, *, version: str = "1", rest: str = "") -> narinfo.Narinfo:
    line = f"Signature: {version};host;{base64.b64encode(text).decode()}\n"
    return narinfo.parse((signed + line + rest).encode(), STORE)


class JudgingTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.file = Path(temporary_directory(self), "acl")
        self.file.write_text(f"(acl (entry {PUBLIC} (tag (guix import))))")
        self.acl = Acl(str(self.file.parent))
        self.digest = hashlib.sha256(SIGNED.encode()).hexdigest().upper()

    def test_vector(self) -> None:
        """U6: what the stock signer has signed."""
        self.assertEqual(
            self.digest, "FF12F747D137CC20576151720FB4B41C74C056BB2C3D407566007D0E7F84D925"
        )
        good = said(SIGNED, signature(self.digest))
        self.assertEqual(Judge(self.acl)([good, good]), [True, True])

    def test_known(self) -> None:
        """U4, U29: what was genuine is not checked again, until it or the list is another."""
        judge = Judge(self.acl)
        good = said(SIGNED, signature(self.digest))
        other = said(SIGNED.replace("NarSize: 120", "NarSize: 121"), signature(self.digest))
        self.assertEqual(judge([good, other]), [True, False])
        self.patch(judging, "verify", None)
        self.assertEqual(judge([good]), [True])
        self.assertRaises(TypeError, judge, [other])
        self.file.write_text("(acl)")
        self.assertRaises(TypeError, judge, [good])

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 255), st.booleans())
    def test_flipped(self, bit: int, in_r: bool) -> None:
        """U6: no bit of the signature may differ."""
        number = int(R if in_r else S, 16) ^ 1 << bit
        changed = f"{number:064X}"
        text = signature(self.digest, *((changed, S) if in_r else (R, changed)))
        self.assertFalse(is_authorised(said(SIGNED, text), self.acl))

    def test_others(self) -> None:
        """U2, U3: another hash, another version, garbage, an unknown key, nothing."""
        good = signature(self.digest)
        other = hashlib.sha256(b"other").hexdigest().upper()
        self.assertFalse(is_authorised(said(SIGNED, signature(other)), self.acl))
        self.assertFalse(is_authorised(said(SIGNED, good, version="2"), self.acl))
        self.assertFalse(is_authorised(said(SIGNED, b"(signature)"), self.acl))
        garbled = narinfo.parse(f"{SIGNED}Signature: 1;host;@@@@\n".encode(), STORE)
        self.assertFalse(is_authorised(garbled, self.acl))
        self.assertFalse(is_authorised(narinfo.parse(SIGNED.encode(), STORE), self.acl))
        stranger = Acl(str(configuration(self)))
        self.assertFalse(is_authorised(said(SIGNED, good), stranger))

    def test_rsa(self) -> None:
        """U7: a key of the other kind."""
        from guixd.signatures import read_key_pair, sign

        directory = configuration(self, "rsa")
        digest = hashlib.sha256(SIGNED.encode()).digest()
        text = sign(digest, read_key_pair(str(directory)))
        self.assertEqual(sexp.parse(text)[0], b"signature")
        self.assertTrue(is_authorised(said(SIGNED, text), Acl(str(directory))))


class PlacesTests(SynchronousTestCase):
    def places(self, server: str, rest: str) -> list[tuple[str, str]]:
        found = narinfo.parse((SIGNED + rest).encode(), STORE)
        known = ("none", "gzip", "lzip", "zstd")
        return [(place.url, place.compression) for place in places(Source(server, found), known)]

    def test_order(self) -> None:
        """U13: the smallest first; without sizes what compresses best; unknown ones never."""
        rest = "".join(
            f"URL: {name}\nCompression: {name}\nFileSize: {size}\n"
            for name, size in (("gzip", 30), ("rar", 1), ("lzip", 20), ("none", 99))
        )
        order = [compression for _, compression in self.places("http://a", rest)]
        self.assertEqual(order, ["lzip", "gzip", "none"])
        rest = "".join(f"URL: {n}\nCompression: {n}\n" for n in ("none", "gzip", "zstd"))
        order = [compression for _, compression in self.places("http://a", rest)]
        self.assertEqual(order, ["zstd", "gzip", "none"])
        rest = rest.replace("none\nCompression: none\n", "none\nCompression: none\nFileSize: 9\n")
        order = [compression for _, compression in self.places("http://a", rest)]
        self.assertEqual(order, ["zstd", "gzip", "none"])  # as the others may be shorter

    def test_urls(self) -> None:
        """U14: relative and absolute ones, with and without a slash behind the server."""
        for server in ("http://a/b", "http://a/b/"):
            self.assertEqual(self.places(server, "URL: nar/x\n"), [("http://a/b/nar/x", "none")])
        for url in ("https://c/x", "http://c:80/x"):
            self.assertEqual(self.places("http://a", f"URL: {url}\n"), [(url, "none")])

    def test_elsewhere(self) -> None:
        """U23: nothing but the web from the web; only what lies below from a directory."""
        for url in ("file:///etc/passwd", "ftp://a/x", "gopher://a/x"):
            self.assertEqual(self.places("http://a", f"URL: {url}\n"), [], url)
        self.assertEqual(self.places("file:///mirror", "URL: nar/x\n"), [("/mirror/nar/x", "none")])
        for url in ("../etc/passwd", "/etc/passwd", "file:///etc/passwd"):
            self.assertEqual(self.places("/mirror", f"URL: {url}\n"), [], url)

    def test_nearer(self) -> None:
        """U23: what a server elsewhere names may not be here; one that is here may name it."""
        text = "URL: nar/x\nURL: http://127.0.0.1:80/x\nURL: http://9.9.9.9/x\n"
        for server, elsewhere in (
            ("http://example.org", Reach.PRIVATE),
            ("https://9.9.9.9:8080/", Reach.PRIVATE),
            ("http://192.168.0.1", Reach.PRIVATE),
            ("http://169.254.0.1", Reach.LINK),
            ("http://localhost:8080", Reach.LOOPBACK),
            ("http://[::1]", Reach.LOOPBACK),
        ):
            found = places(Source(server, narinfo.parse((SIGNED + text).encode(), STORE)), ["none"])
            expected = [Reach.LOOPBACK, elsewhere, elsewhere]
            self.assertEqual([place.nearest for place in found], expected, server)
