"""Signatures over a sha256 (spec: store §13, substitutes §4).

Keys are on the curve Ed25519 but used for ECDSA with the nonce of RFC 6979; RSA
keys work, too.
"""

from __future__ import annotations

from typing import Final

from guixd.errors import (
    BadExpression,
    CorruptSignature,
    InvalidSignature,
    OtherHashSigned,
    UnauthorizedKey,
)
from guixd.formats import sexp
from guixd.formats.sexp import Expression, Member
from guixd.signatures import gcrypt
from guixd.signatures.acl import Keyring
from guixd.signatures.keys import KeyPair

MAX_SIZE: Final = 64 * 1024
"""Bytes of the longest signature that is read."""
_DIGEST_SIZE = 32
_FLAGS: Final = {b"ecc": b"rfc6979", b"rsa": b"pkcs1"}


def sign(digest: bytes, keys: KeyPair) -> bytes:
    """Return the signature of the sha256 DIGEST by KEYS, as the stock signer writes it.

    :raises SignatureError: the key cannot be used, or the library is not there.
    """
    data = _data(_FLAGS.get(_kind(keys.public), b"rfc6979"), digest)
    value = gcrypt.sign(data, keys.secret)
    return sexp.pretty((b"signature", data, value, keys.public))


def verify(signature: bytes, acl: Keyring, expected: bytes | None = None) -> bytes:
    """Return the sha256 that the text SIGNATURE is for.

    :param acl: whose signatures count.
    :param expected: the sha256 that it must be for; any one by default.
    :raises CorruptSignature: the text is no signature.
    :raises UnauthorizedKey: the key is not in ACL.
    :raises OtherHashSigned: it is not for EXPECTED.
    :raises InvalidSignature: it was not made with the key.  The first of these counts.
    :raises SignatureError: ACL or the library cannot be had.
    """
    try:
        whole = sexp.parse(signature, max_size=MAX_SIZE)
    except BadExpression as error:
        raise CorruptSignature(f"corrupt signature data: {error.text}") from error
    data, key = _part(whole, b"data"), _part(whole, b"public-key")
    # What is verified is made anew from this, so that nothing else in it can count.
    match data:
        case (b"data", (b"flags", bytes(flags)), (b"hash", b"sha256", bytes(digest))) if (
            flags in _FLAGS.values() and len(digest) == _DIGEST_SIZE
        ):
            pass
        case _:
            raise CorruptSignature("corrupt signature data: not the hash of anything")
    if key is None:
        raise CorruptSignature("corrupt signature data: no public key")
    if not acl.authorises(key):
        raise UnauthorizedKey(
            "unauthorized public key: " + " ".join(sexp.pretty(key).decode("latin-1").split())
        )
    if expected is not None and digest != expected:
        raise OtherHashSigned("the signature is for another hash")
    value = _part(whole, b"sig-val")
    if value is None or not gcrypt.is_genuine(value, _data(flags, digest), key):
        raise InvalidSignature("invalid signature")
    return digest


def _data(flags: bytes, digest: bytes) -> Expression:
    return (b"data", (b"flags", flags), (b"hash", b"sha256", digest))


def _kind(key: Expression) -> bytes:
    """Return the algorithm of KEY, empty if it has none."""
    match key:
        case (_, (bytes(kind), *_)):
            return kind
    return b""


def _part(signature: Expression, name: bytes) -> Expression | None:
    """Return the list in SIGNATURE that begins with NAME."""
    if signature[:1] != (b"signature",):
        return None

    def is_wanted(member: Member) -> bool:
        return not isinstance(member, bytes) and member[:1] == (name,)

    found = [member for member in signature if is_wanted(member)]
    return found[0] if len(found) == 1 and not isinstance(found[0], bytes) else None
