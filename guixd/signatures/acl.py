"""Whose archives and substitutes are taken: the access control list (spec: store §13)."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final, Protocol

from guixd.errors import BadExpression, SignatureError
from guixd.formats import sexp
from guixd.formats.sexp import Expression
from guixd.signatures.keys import PUBLIC_FILE, read_public_key

ACL_FILE: Final = "acl"
_TAG: Final = (b"tag", (b"guix", b"import"))

_Mark = tuple[int, int, int, int] | None


class Keyring(Protocol):
    """Keys that count."""

    def authorises(self, key: Expression, /) -> bool:
        """Whether KEY, a `(public-key ...)`, does."""


@dataclass(frozen=True, slots=True)
class Keys:
    """What an access control list said at some time."""

    keys: frozenset[Expression]

    def authorises(self, key: Expression) -> bool:
        return key in self.keys


class Acl:
    """The keys that may sign what is imported; for any number of threads.

    The file counts as it is at each question, so that a key counts, or no longer
    counts, as soon as the administrator has changed it.
    """

    def __init__(self, directory: str) -> None:
        """Prepare.

        :param directory: the configuration directory; nothing is read yet.
        """
        self._directory = directory
        self._file = f"{directory}/{ACL_FILE}"
        self._turn = Lock()
        self._mark: _Mark = None
        self._keys: frozenset[Expression] = frozenset()

    def authorises(self, key: Expression) -> bool:
        """Whether KEY, a `(public-key ...)`, is in the list; errors as in `keys`."""
        return key in self.keys()

    def keys(self) -> frozenset[Expression]:
        """Return the authorised keys, each a `(public-key ...)`.

        If there is no list, one is made of the host's own key; without that, nobody
        is authorised.

        :raises BadExpression: the list is malformed, or the host's own key.
        :raises SignatureError: the list cannot be read or made.
        """
        with self._turn:
            mark = self._look()
            if mark is None:
                return self._make()
            if mark != self._mark:
                # The mark is from before: what changes meanwhile is read again.
                self._keys = self._read()
                self._mark = mark
            return self._keys

    def shortcoming(self) -> str:
        """Return why nobody else's signatures count, empty if some do; errors as in `keys`."""
        keys = self.keys()
        if not keys:
            who = "nobody is authorised"
        elif len(keys) == 1 and keys == self._own():
            who = "only this machine itself is authorised"
        else:
            return ""
        return (
            f"{who} to sign substitutes, so that none of others are taken;"
            f" authorise their keys in '{self._file}' by 'guix archive --authorize'"
        )

    def _own(self) -> set[Expression]:
        try:
            return {read_public_key(self._directory)}
        except (BadExpression, SignatureError):
            return set()

    def _look(self) -> _Mark:
        try:
            status = os.stat(self._file)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._trouble("read", error) from error
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size

    def _read(self) -> frozenset[Expression]:
        try:
            with Path(self._file).open("rb") as stream:
                text = stream.read(sexp.MAX_SIZE + 1)
        except OSError as error:
            raise self._trouble("read", error) from error
        try:
            return _authorised(sexp.parse(text))
        except BadExpression as error:
            raise BadExpression(
                f"the access control list '{self._file}' is malformed: {error.text}"
            ) from error

    def _make(self) -> frozenset[Expression]:
        if not os.path.exists(f"{self._directory}/{PUBLIC_FILE}"):
            return frozenset()
        key = read_public_key(self._directory)
        text = sexp.pretty((b"acl", (b"entry", key, _TAG)))
        try:
            fd, temporary = tempfile.mkstemp(dir=self._directory, prefix=f".{ACL_FILE}-")
            with os.fdopen(fd, "wb") as stream:
                os.fchmod(fd, 0o644)
                stream.write(text)
            try:
                os.link(temporary, self._file)  # unlike renaming, this replaces nothing
            except FileExistsError:
                return self._read()
            finally:
                os.unlink(temporary)
        except OSError as error:
            raise self._trouble("make", error) from error
        return frozenset((key,))

    def _trouble(self, verb: str, error: OSError) -> SignatureError:
        return SignatureError(
            f"cannot {verb} the access control list '{self._file}': {error.strerror}"
        )


def _authorised(acl: Expression) -> frozenset[Expression]:
    if acl[:1] != (b"acl",):
        raise BadExpression("it does not begin with 'acl'")
    keys: set[Expression] = set()
    for entry in acl[1:]:
        match entry:
            case (b"entry", (b"public-key", *_) as key, tag) if tag == _TAG:
                keys.add(key)
            case _:
                raise BadExpression("an entry is not a public key with the tag 'guix import'")
    return frozenset(keys)
