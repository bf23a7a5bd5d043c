"""The host's own keys, in the files of the configuration directory (spec: store §13)."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from guixd.errors import BadExpression, SignatureError
from guixd.formats import sexp
from guixd.formats.sexp import Expression

SECRET_FILE: Final = "signing-key.sec"
PUBLIC_FILE: Final = "signing-key.pub"


@dataclass(frozen=True, slots=True, repr=False)
class KeyPair:
    """What signs, and what others know it by."""

    secret: Expression
    """A `(private-key ...)`."""
    public: Expression
    """A `(public-key ...)`."""


def read_key_pair(directory: str) -> KeyPair:
    """Return the keys with which this host signs.

    :param directory: the configuration directory.
    :raises SignatureError: there are none, or others may read the secret key.
    :raises BadExpression: a file does not hold a key.
    """
    secret = _read(f"{directory}/{SECRET_FILE}", b"private-key", secret=True)
    return KeyPair(secret, read_public_key(directory))


def read_public_key(directory: str) -> Expression:
    """Return the public key of this host, a `(public-key ...)`; errors as in `read_key_pair`."""
    return _read(f"{directory}/{PUBLIC_FILE}", b"public-key")


def _read(file: str, kind: bytes, *, secret: bool = False) -> Expression:
    try:
        with Path(file).open("rb") as stream:
            if secret and stat.S_IMODE(os.fstat(stream.fileno()).st_mode) & 0o077:
                raise SignatureError(
                    f"file '{file}' must be accessible to its owner only: change its mode to 0400"
                )
            text = stream.read(sexp.MAX_SIZE + 1)
    except OSError as error:
        raise SignatureError(f"cannot read the key '{file}': {error.strerror}") from error
    try:
        key = sexp.parse(text)
    except BadExpression as error:
        raise BadExpression(f"file '{file}' does not hold a key: {error.text}") from error
    if key[:1] != (kind,):
        raise BadExpression(f"file '{file}' does not hold a {kind.decode()}")
    return key
