"""Hash algorithms of the store and the nix-base32 notation (spec: store §2)."""

from __future__ import annotations

import hashlib
from typing import Protocol

from guixd.errors import BadHash

BASE32_ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"
_PAIRS = [high + low for high in BASE32_ALPHABET for low in BASE32_ALPHABET]
_DIGITS = bytes(map(ord, BASE32_ALPHABET)) + bytes(224)
_HALVES = [  # for 2, 4, ..., 32 groups: where the lower one of each pair is, and 3/5 of its width
    (sum((1 << 5 * size) - 1 << 16 * size * place for place in range(16 // size)), 3 * size)
    for size in (16, 8, 4, 2, 1)
]
_VALUES = {ord(c): i for i, c in enumerate(BASE32_ALPHABET)}


class Hash(Protocol):
    """A running hash, such as those of hashlib."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


_HASHLIB_NAMES = {
    "md5": "md5",
    "sha1": "sha1",
    "sha256": "sha256",
    "sha512": "sha512",
    "sha3-256": "sha3_256",
    "sha3-512": "sha3_512",
    "blake2s-256": "blake2s",
}
ALGORITHMS = tuple(_HASHLIB_NAMES)
_SIZES = {name: hashlib.new(known).digest_size for name, known in _HASHLIB_NAMES.items()}


def new(algorithm: str) -> Hash:
    """Return a fresh hash of ALGORITHM, one of `ALGORITHMS`.

    :raises BadHash: the algorithm is unknown.
    """
    try:
        return hashlib.new(_HASHLIB_NAMES[algorithm], usedforsecurity=False)
    except KeyError:
        raise BadHash(
            f"unknown hash algorithm '{algorithm}', known are {', '.join(ALGORITHMS)}"
        ) from None


def digest_size(algorithm: str) -> int:
    """Return the size of a digest of ALGORITHM in bytes.

    :raises BadHash: the algorithm is unknown.
    """
    new(algorithm)
    return _SIZES[algorithm]


def to_base32(digest: bytes) -> str:
    """Write DIGEST in nix-base32: a little-endian number, most significant digit first."""
    number = int.from_bytes(digest, "little")
    length = (len(digest) * 8 + 4) // 5
    # Two digits at a time; of an odd number the first one is too many.
    shifts = range(10 * ((length + 1) // 2 - 1), -1, -10)
    return "".join([_PAIRS[number >> shift & 1023] for shift in shifts])[length & 1 :]


def folded_base32(digest: bytes) -> str:
    """Return the 20 bytes in nix-base32 that a DIGEST of 21 to 40 bytes is in store file names.

    Those beyond the twentieth are combined with the first by XOR.
    """
    spread = int.from_bytes(digest[:20], "little") ^ int.from_bytes(digest[20:], "little")
    # Halve the groups of bits, from one of 160 to 32 of 5, each of which gets a byte.
    for mask, shift in _HALVES:
        lower = spread & mask
        spread = lower | (spread ^ lower) << shift
    return str(spread.to_bytes(32, "big").translate(_DIGITS), "ascii")


def from_base32(text: str, size: int) -> bytes:
    """Read SIZE bytes written in nix-base32, strictly.

    :raises BadHash: wrong length, a character outside the alphabet, or bits
        that do not fit SIZE bytes.
    """
    if len(text) != (size * 8 + 4) // 5:
        raise BadHash(f"'{text}' is not the nix-base32 form of {size} bytes")
    number = 0
    for character in text:
        value = _VALUES.get(ord(character))
        if value is None:
            raise BadHash(f"invalid nix-base32 character '{character}' in '{text}'")
        number = number << 5 | value
    if number >> (size * 8):
        raise BadHash(f"'{text}' has more bits than {size} bytes")
    return number.to_bytes(size, "little")


def from_hex(text: str, algorithm: str) -> bytes:
    """Read a digest of ALGORITHM from hexadecimal TEXT of either letter case.

    :raises BadHash: wrong length or digits; the text names the algorithm in
        upper case, as clients search for it ("invalid SHA256 hash").
    """
    size = digest_size(algorithm)
    try:
        digest = bytes.fromhex(text) if len(text) == 2 * size else b""
    except ValueError:
        digest = b""
    if len(digest) != size:
        raise BadHash(f"invalid {algorithm.upper()} hash '{text}'")
    return digest
