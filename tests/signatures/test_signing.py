"""Signatures: the same bytes as the stock signer's, and all the ways to refuse one."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import (
    CorruptSignature,
    GuixdError,
    InvalidSignature,
    OtherHashSigned,
    SignatureError,
    UnauthorizedKey,
)
from guixd.formats import sexp
from guixd.formats.sexp import Expression, parse, pretty
from guixd.signatures import Acl, KeyPair, gcrypt, read_key_pair, sign, verify
from tests.signatures.keys import SIGNED, configuration, golden, install
from tests.support import temporary_directory

ORDER = 2**252 + 27742317777372353535851937790883648493
# Hashes and what the stock signer made of them with the key `ecc`.
VECTORS = {
    "0807B7C25B37EFFA1FF1371FABA593621210297F9A5D2B283BA5073BFFA4AAB1": (
        "0F01C2918A260CACECA3BA877DEFCCE25EC3AB0A41DCDFF1F8E79BBE3CF265EE",
        "0CBC50D72C724BCAF02CA42AC29B8D45CEFAD82E984CB9D8EE861E2A5F222ED2",
    ),
    "A52A4044C155DAF0C5627E2BD8C72713D8F7503FE073D9CD83433EB50DCA855C": (
        "044EE252B753F8091AD88E9D52D64781D991ED3FF15817C04271AE9768C41131",
        "0FE9662C4B066AAF1E4A4C265B242DC834954F880BE17C94713C182235817F9F",
    ),
    "D514B1CF6EBF7C6467F0C695F1889A62F5E507612F2F9FFA1D894725A282A4B9": (
        "05675CC17CC4ADD46A883C4B3FD749276FBD5CEA320FE82A75B4CE33D71636E6",
        "078443EF7E29251181DDF625ECAB90AF4EE397DAAC2B206C2FC797D960683A17",
    ),
}


def signature(
    value: Expression, digest: bytes, key: Expression, flags: bytes = b"rfc6979"
) -> bytes:
    data = (b"data", (b"flags", flags), (b"hash", b"sha256", digest))
    return pretty((b"signature", data, value, key))


def ecdsa(r: bytes, s: bytes) -> Expression:
    return (b"sig-val", (b"ecdsa", (b"r", r), (b"s", s)))


def public_key(q: str) -> Expression:
    return (b"public-key", (b"ecc", (b"curve", b"Ed25519"), (b"q", bytes.fromhex(q))))


def values(text: bytes) -> tuple[bytes, bytes]:
    """Return r and s of a signature."""
    _, _, (_, (_, (_, r), (_, s))), _ = parse(text)
    return r, s


class Signing(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = configuration(self)
        self.keys = read_key_pair(str(self.directory))
        self.acl = Acl(str(self.directory))

    def test_recorded(self) -> None:
        """S23: byte for byte what the stock signer writes, on both kinds of keys."""
        for kind in "ecc", "rsa":
            directory = str(configuration(self, kind))
            text = sign(SIGNED, read_key_pair(directory))
            self.assertEqual(text, golden(f"{kind}.signature"))
            self.assertEqual(verify(text, Acl(directory)), SIGNED)

    def test_vectors(self) -> None:
        """S22, S23: the hashes of the export bodies, signed."""
        for digest, (r, s) in VECTORS.items():
            text = sign(bytes.fromhex(digest), self.keys)
            self.assertEqual(values(text), (bytes.fromhex(r), bytes.fromhex(s)))
            self.assertEqual(verify(text, self.acl).hex().upper(), digest)

    def test_dropped_zero(self) -> None:
        """S29: r and s are as short as they can be, and are taken so."""
        short = {0: b"", 1: b""}
        for number in range(400):
            digest = hashlib.sha256(b"%d" % number).digest()
            text = sign(digest, self.keys)
            for which, value in enumerate(values(text)):
                self.assertNotEqual(value[0], 0)
                if len(value) < 32 and not short[which]:
                    short[which] = text
                    self.assertEqual(verify(text, self.acl), digest)
            if all(short.values()):
                return
        self.fail("no short value among all these")

    def test_in_threads(self) -> None:
        """Several threads sign and verify at once."""
        digests = [hashlib.sha256(b"%d" % number).digest() for number in range(64)]

        def turn(digest: bytes) -> bytes:
            return verify(sign(digest, self.keys), self.acl)

        with ThreadPoolExecutor(4) as pool:
            self.assertEqual(list(pool.map(turn, digests)), digests)

    def test_unusable_key(self) -> None:
        for secret in (b"private-key",), (b"private-key", (b"ecc", (b"curve", b"Nothing"))):
            with self.assertRaises(SignatureError):
                sign(SIGNED, KeyPair(secret, self.keys.public))

    def test_library_is_missing(self) -> None:
        """The error says what to install, and the next use looks again."""
        self.patch(gcrypt, "LIBRARY", "libnothing.so.77")
        self.addCleanup(gcrypt._library.cache_clear)
        gcrypt._library.cache_clear()
        for _ in range(2):
            with self.assertRaisesRegex(SignatureError, "libnothing.so.77.*libgcrypt20"):
                sign(SIGNED, self.keys)


class Verifying(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = configuration(self)
        self.acl = Acl(str(self.directory))
        self.text = golden("ecc.signature")
        _, self.data, self.value, self.key = parse(self.text)

    def refused(self, text: bytes, error: type[GuixdError], part: str) -> None:
        with self.assertRaisesRegex(error, part):
            verify(text, self.acl)

    def test_narinfo_vector(self) -> None:
        """The signature of a narinfo, with a key of its own."""
        digest = bytes.fromhex("FF12F747D137CC20576151720FB4B41C74C056BB2C3D407566007D0E7F84D925")
        key = public_key("905E134890E16BAD130A55BD2079BE3C44D3246E31466ABD3C771BE338D1EAEB")
        value = ecdsa(
            bytes.fromhex("094C6C7DF70C875F3180C904E9F81B0123B77F562265A14A4D3904361FF5358E"),
            bytes.fromhex("0B23A5B6E8BB76D8B2B197144996DB4FA95ECB0D9937C22A9EFE5404CA94FA1E"),
        )
        (self.directory / "acl").write_bytes(
            pretty((b"acl", (b"entry", key, (b"tag", (b"guix", b"import")))))
        )
        self.assertEqual(verify(signature(value, digest, key), self.acl), digest)
        self.assertEqual(verify(signature(value, digest, key), self.acl, digest), digest)

    def test_order_of_outcomes(self) -> None:
        """S24: corrupt, then unauthorised, then another hash, then invalid."""
        other = public_key("00" * 32)
        wrong = ecdsa(b"\1", b"\1")
        with self.assertRaises(UnauthorizedKey):
            verify(signature(wrong, SIGNED, other), self.acl, bytes(32))
        with self.assertRaises(OtherHashSigned):
            verify(signature(wrong, SIGNED, self.key), self.acl, bytes(32))
        with self.assertRaises(InvalidSignature):
            verify(signature(wrong, SIGNED, self.key), self.acl, SIGNED)
        with self.assertRaises(CorruptSignature):
            verify(signature(wrong, SIGNED[:-1], other), self.acl, bytes(32))

    def test_texts(self) -> None:
        """S24: what a client may search the errors for."""
        self.refused(b"nonsense", CorruptSignature, "corrupt signature data")
        self.refused(
            signature(self.value, SIGNED, public_key("00" * 32)),
            UnauthorizedKey,
            r"unauthorized public key.*Ed25519\) \(q #0000",
        )
        self.refused(
            signature(ecdsa(b"\1", b"\1"), SIGNED, self.key), InvalidSignature, "invalid signature"
        )

    def test_quoted_atoms(self) -> None:
        """S28: atoms in other notations mean the same."""
        q = bytes.fromhex("8E729696EAE580F829554DBD0F58FB0910768D4EA2DFF1B4CEA1F19998342272")
        quoted = b'"' + b"".join(b"\\x%02x" % byte for byte in q) + b'"'
        text = self.text.replace(b"#" + q.hex().upper().encode() + b"#", quoted)
        self.assertNotEqual(text, self.text)
        text = text.replace(b"sha256", b'"sha256"').replace(b"Ed25519", b"|RWQyNTUxOQ==|")
        self.assertEqual(verify(text, self.acl), SIGNED)
        self.assertEqual(verify(sexp.canonical(parse(text)), self.acl), SIGNED)
        self.assertEqual(verify(b" ".join(text.split()), self.acl), SIGNED)

    def test_every_bit(self) -> None:
        """A flipped bit of the hash, r or s makes it invalid; of the key, unauthorised."""
        r, s = values(self.text)
        for bit in range(256):

            def flip(whole: bytes, mask: int = 1 << bit) -> bytes:
                return (int.from_bytes(whole) ^ mask).to_bytes(32)

            for text in (
                signature(ecdsa(flip(r), s), SIGNED, self.key),
                signature(ecdsa(r, flip(s)), SIGNED, self.key),
            ):
                self.refused(text, InvalidSignature, "invalid")
            changed = signature(ecdsa(r, s), flip(SIGNED), self.key)
            # The curve's order has 253 bits, so that the last three do not count.
            if bit >= 3:
                self.refused(changed, InvalidSignature, "invalid")
            else:
                self.assertEqual(verify(changed, self.acl), flip(SIGNED))

    def test_bounds(self) -> None:
        """Zero and the order and more are no values of a signature."""
        r, s = values(self.text)
        more = [
            (int.from_bytes(value) + ORDER).to_bytes(33) for value in (r, s)
        ]  # the same modulo the order
        for one, two in (
            (b"", s), (r, b""), (b"\0", s), (r, b"\0"), (b"\0", b"\0"),
            (ORDER.to_bytes(32), s), (r, ORDER.to_bytes(32)), (more[0], s), (r, more[1]),
            (b"\xff" * 32, s), (r, b"\xff" * 32), (b"\xff" * 5000, s),
        ):  # fmt: skip
            self.refused(signature(ecdsa(one, two), SIGNED, self.key), InvalidSignature, "invalid")

    def test_malformed(self) -> None:
        hash_ = (b"hash", b"sha256", SIGNED)
        data = (b"data", (b"flags", b"rfc6979"), hash_)
        for whole in (
            (),
            (b"signature",),
            (b"sign", data, self.value, self.key),
            (b"signature", self.value, self.key),
            (b"signature", data, self.value),
            (b"signature", data, data, self.value, self.key),
            (b"signature", data, self.value, self.key, self.key),
            (b"signature", (b"data", hash_), self.value, self.key),
            (b"signature", (b"data", (b"flags", b"raw"), hash_), self.value, self.key),
            (b"signature", (b"data", (b"flags", b"eddsa"), hash_), self.value, self.key),
            (b"signature", (*data, (b"value", b"\1")), self.value, self.key),
            (b"signature", (*data, hash_), self.value, self.key),
            (b"signature", (b"data", data[1], (b"hash", b"sha1", SIGNED)), self.value, self.key),
            (b"signature", (*data[:2], (b"hash", b"sha256", (SIGNED,))), self.value, self.key),
        ):  # fmt: skip
            self.refused(pretty(whole), CorruptSignature, "corrupt signature data")
        self.refused(b"(" * 100_000, CorruptSignature, "corrupt signature data")

    def test_values_that_are_none(self) -> None:
        for value in (
            (b"sig-val",),
            (b"sig-val", b"x"),
            (b"sig-val", (b"", b"")),
            (b"sig-val", (b"ecdsa",)),
            (b"sig-val", (b"rsa", (b"s", b"\1"))),
            (b"sig-val", (b"eddsa", (b"r", bytes(32)), (b"s", bytes(32)))),
        ):  # fmt: skip
            self.refused(signature(value, SIGNED, self.key), InvalidSignature, "invalid")
        self.refused(pretty((b"signature", self.data, self.key)), InvalidSignature, "invalid")

    def test_key_of_another_kind(self) -> None:
        """A signature cannot be passed off as one by another authorised key."""
        rsa = parse(golden("rsa.pub"))
        (self.directory / "acl").write_bytes(golden("rsa.acl"))
        self.refused(signature(self.value, SIGNED, rsa), InvalidSignature, "invalid")
        self.refused(signature(self.value, SIGNED, rsa, b"pkcs1"), InvalidSignature, "invalid")
        self.refused(golden("ecc.signature"), UnauthorizedKey, "unauthorized public key")

    def test_no_keys_at_all(self) -> None:
        acl = Acl(temporary_directory(self))
        with self.assertRaises(UnauthorizedKey):
            verify(self.text, acl)


class Installed(SynchronousTestCase):
    def test_kinds(self) -> None:
        """The recorded lists are what we would make of the recorded keys (S30)."""
        for kind in "ecc", "rsa":
            directory = temporary_directory(self)
            install(directory, kind)
            self.assertTrue(Acl(directory).authorises(parse(golden(f"{kind}.pub"))))
            with open(f"{directory}/acl", "rb") as stream:  # noqa: PTH123
                self.assertEqual(stream.read(), golden(f"{kind}.acl"))
