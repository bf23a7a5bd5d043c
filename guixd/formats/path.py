"""Store paths: one type, how they are computed and tested (spec: store §3)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from guixd.errors import BadName, NotInStore
from guixd.formats.hashes import folded_base32

HASH_LENGTH = 32
DERIVATION_SUFFIX = ".drv"
_NAME = re.compile(r"(?!\.)[A-Za-z0-9+\-._?=]*\Z")


class StorePath(str):
    """The absolute file name of a direct child of the store.

    Made by `StoreDirectory` only, so that whoever has one knows it was tested.
    Bytes that are not UTF-8 are kept as surrogate escapes.
    """

    __slots__ = ()

    @property
    def base(self) -> str:
        """The last component, usually `HASH-NAME`."""
        return self[self.rindex("/") + 1 :]

    @property
    def hash_part(self) -> str:
        """The first 32 characters of the base name."""
        return self.base[:HASH_LENGTH]

    @property
    def name(self) -> str:
        """What follows the hash part and its dash; empty in a short name."""
        return self.base[HASH_LENGTH + 1 :]

    @property
    def is_derivation(self) -> bool:
        """Whether the name ends in `.drv`."""
        return self.endswith(DERIVATION_SUFFIX)


def check_name(name: str) -> None:
    """Test the characters of NAME.

    :raises BadName: a leading dot or a character that is not allowed.
    """
    if not _NAME.match(name):
        raise BadName(
            f"invalid name '{name}': only letters, digits and '+-._?=' are allowed,"
            " and no dot at the beginning"
        )


class StoreDirectory(NamedTuple):
    """The store directory: computes and tests the names of its items."""

    path: str = "/gnu/store"

    def parse(self, raw: str | bytes) -> StorePath:
        """Return RAW as a store path; only its form is tested (spec: protocol §2).

        :raises NotInStore: RAW is not the store directory, a slash and one name.
        """
        text = raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else raw
        prefix = self.path + "/"
        if not text.startswith(prefix) or len(text) == len(prefix) or "/" in text[len(prefix) :]:
            raise NotInStore(f"path '{text}' is not in the store '{self.path}'")
        return StorePath(text)

    def has_child(self, path: str) -> bool:
        """Whether PATH is the store directory, a slash and one name."""
        directory, _, name = path.rpartition("/")
        return directory == self.path and name not in ("", ".", "..")

    def containing(self, text: str) -> StorePath:
        """Return the item that TEXT names or lies in.

        :raises NotInStore: TEXT is not below the store.
        """
        prefix = self.path + "/"
        if not text.startswith(prefix):
            raise NotInStore(f"path '{text}' is not in the store '{self.path}'")
        return self.parse(prefix + text[len(prefix) :].split("/", 1)[0])

    def child(self, base: str) -> StorePath:
        """Return the item whose base name is BASE.

        :raises NotInStore: BASE is empty or has a slash.
        """
        return self.parse(f"{self.path}/{base}")

    def make(self, kind: str, inner: bytes, name: str) -> StorePath:
        """Compute a path from its fingerprint; KIND is `text`, `source`, `output:ID`...

        :raises BadName: NAME has characters that are not allowed.
        """
        check_name(name)
        fingerprint = f"{kind}:sha256:{inner.hex()}:{self.path}:{name}"
        digest = hashlib.sha256(fingerprint.encode("utf-8", "surrogateescape")).digest()
        return StorePath(f"{self.path}/{folded_base32(digest)}-{name}")

    def text_path(self, name: str, digest: bytes, references: Iterable[str]) -> StorePath:
        """Return the path of a text whose sha256 is DIGEST and that refers to REFERENCES."""
        return self.make(":".join(["text", *sorted(references)]), digest, name)

    def source_path(self, name: str, nar_digest: bytes) -> StorePath:
        """Return the path of a tree whose NAR has the sha256 NAR_DIGEST."""
        return self.make("source", nar_digest, name)

    def fixed_path(self, name: str, algorithm: str, recursive: bool, digest: bytes) -> StorePath:
        """Return the path of contents with a known digest.

        DIGEST is that of the NAR if RECURSIVE, else that of the file's contents.
        """
        if recursive and algorithm == "sha256":
            return self.source_path(name, digest)
        mode = "r:" if recursive else ""
        text = f"fixed:out:{mode}{algorithm}:{digest.hex()}:"
        return self.make("output:out", hashlib.sha256(text.encode()).digest(), name)

    def output_path(self, output: str, digest: bytes, name: str) -> StorePath:
        """Return the path of OUTPUT of a derivation NAME with the modulo hash DIGEST."""
        return self.make(
            f"output:{output}", digest, name if output == "out" else f"{name}-{output}"
        )
