"""What follows a NAR in an archive of store items (spec: store §12).

    item = NAR  int MAGIC  path  references  deriver  int signed  [signature]

The signature is over the sha256 of all before `int signed`.  A stream of items, as
clients make and send it, has `long 1` before each and `long 0` at its end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from guixd.errors import BadArchive, BadName
from guixd.formats import wire
from guixd.formats.hashes import BASE32_ALPHABET
from guixd.formats.path import HASH_LENGTH, StorePath, check_name

MAGIC: Final = 0x4558494E
ITEM: Final = wire.encode_long(1)
"""Precedes an item of a stream."""
END: Final = wire.encode_long(0)
UNSIGNED: Final = wire.encode_int(0)
MAX_SIGNATURE: Final = 64 * 1024
"""Bytes of the longest signature."""
MAX_REFERENCES: Final = 16 * 1024 * 1024
"""Most bytes of what lies between the NAR and the signature."""
_DESCRIPTION: Final = wire.Series(wire.INT, wire.PATH, wire.PATHS, wire.OPTIONAL_PATH)
_BASE = re.compile(f"[{BASE32_ALPHABET}]{{{HASH_LENGTH}}}-")


@dataclass(frozen=True, slots=True)
class Description:
    """What an archive says of its item."""

    path: StorePath
    references: tuple[StorePath, ...]
    """Sorted."""
    deriver: StorePath | None = None

    def encode(self) -> bytes:
        """Return the bytes that follow the NAR and are signed with it."""
        return _DESCRIPTION.encode((MAGIC, self.path, self.references, self.deriver))


def signed(signature: bytes) -> bytes:
    """Return what ends an item that has SIGNATURE."""
    return wire.encode_int(1) + wire.encode_bytes(signature)


class DescriptionReader:
    """Reads a `Description`."""

    def __init__(self) -> None:
        self._reader = _DESCRIPTION.begin()

    def resume(self, source: wire.Source) -> Description | wire.More:
        """Go on with SOURCE.

        :raises BadArchive: this is none.
        :raises BadName: the path is not one that an item can have.
        :raises GuixdError: the bytes are malformed, or a path is not in the store.
        """
        values = self._reader.resume(source)
        if values is wire.MORE:
            return wire.MORE
        magic, path, references, deriver = values
        if magic != MAGIC:
            raise BadArchive("bad archive: what follows its contents is not about a store item")
        check_item(path)
        return Description(path, references, deriver)


def check_item(path: StorePath) -> None:
    """Test that PATH is `HASH-NAME` in form, and not the name of a lock.

    :raises BadName: it is something else.
    """
    if not _BASE.match(path.base) or path.endswith(".lock"):
        raise BadName(f"'{path}' is not the name of a store item")
    check_name(path.name)
