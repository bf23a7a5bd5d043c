"""A stream of signed archives in, store items out (spec: store §12).

Checking, hashing and writing happen in one pass over each block.  What has been
received is an item only when its signature counts; until then its files lie beside
the items, under a name that is protected from collectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from guixd.errors import (
    BadArchive,
    CorruptSignature,
    ProtocolError,
    SignatureError,
)
from guixd.faults import reached
from guixd.formats import export, nar, wire
from guixd.formats.export import Description
from guixd.formats.path import StoreDirectory
from guixd.formats.wire import MORE, Source
from guixd.signatures import Acl, verify
from guixd.store.items import Registration
from guixd.store.links import Links
from guixd.store.removal import remove_path
from guixd.store.restore import TreeWriter


@dataclass(frozen=True, slots=True)
class Arrival:
    """An item that has been received as a whole, with a signature that counts."""

    staging: str
    """Where its files are, in the form that they shall have."""
    item: Registration
    """What was said of it."""


class Import:
    """What ImportPaths (op 27) receives; to be fed by one thread at a time.

    :ivar names: unused names in the store, one of which each item takes.
    :ivar arrived: the items that have been received, in order; the caller takes them out.
    :ivar complete: whether the end of the stream has been read.
    """

    def __init__(self, store: StoreDirectory, acl: Acl, links: Links | None = None) -> None:
        """Prepare.

        :param acl: whose signatures count.
        :param links: where the files are shared with equal ones.
        """
        self.names: list[str] = []
        self.arrived: list[Arrival] = []
        self.complete = False
        self._store = store
        self._acl = acl
        self._links = links
        self._step: Callable[[memoryview], int] = self._between
        self._source = Source(store)
        self._received = hashlib.sha256()
        self._pending = bytearray()  # received and neither used nor hashed
        self._staging = ""
        self._writer: TreeWriter | None = None
        self._parser: nar.NarParser | None = None
        self._nar_hash = b""
        self._nar_size = 0
        self._reader = export.DescriptionReader()
        self._description: Description | None = None

    @property
    def needed(self) -> int:
        """How many bytes are sure to follow those given so far, at least."""
        parser = self._parser
        return 0 if self.complete else 1 if parser is None else max(parser.contents_left, 1)

    def feed(self, data: bytes) -> int:
        """Take in DATA; return how many bytes of it were used.

        These are all, unless the stream ends in DATA or there are no more `names`.

        :raises GuixdError: the stream is malformed, an item's signature does not count,
            or the item cannot be written.  Nothing can be fed after that.
        """
        used = 0
        with memoryview(data) as view:
            while used < len(view) and not self.complete:
                if self._step == self._between and not self.names:
                    break
                try:
                    used += self._step(view[used:])
                except ProtocolError as error:
                    raise BadArchive(f"bad archive: {error.text}") from error
        return used

    def discard(self) -> None:
        """Remove all that was written for items that have not been taken out."""
        staged = [arrival.staging for arrival in self.arrived]
        self.arrived.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            staged.append(self._staging)
        for name in staged:
            self._remove(name)

    def remove(self, arrival: Arrival) -> None:
        """Remove the files of ARRIVAL, which nobody needs."""
        self._remove(arrival.staging)

    def _remove(self, name: str) -> None:
        if self._links is not None:
            self._links.forget(name)
        remove_path(name)

    # The steps: each gets what has not been used and returns how much of it is used now.

    def _read(self, reader: wire.Reader[object], view: memoryview) -> tuple[object, int]:
        """Go on with READER; return its value, or `MORE`, and how much of VIEW is used."""
        self._pending += view
        if len(self._pending) > export.MAX_REFERENCES:
            raise BadArchive("bad archive: too much is said about an item")
        self._source.feed(view)
        value = reader.resume(self._source)
        left = len(self._source)
        if value is MORE:
            self._source.settle()
            return MORE, len(view)
        self._source = Source(self._store)
        del self._pending[len(self._pending) - left :]
        return value, len(view) - left

    def _between(self, view: memoryview) -> int:
        value, used = self._read(wire.LONG, view)
        if value is MORE:
            return used
        self._pending.clear()
        if value == 1:
            self._begin()
        elif value == 0:
            self.complete = True
        else:
            raise BadArchive("bad archive: this is not a stream of store items")
        return used

    def _begin(self) -> None:
        self._staging = self.names.pop()
        self._writer = TreeWriter(None, self._staging, self._links)
        self._parser = nar.NarParser(self._writer)
        self._received = hashlib.sha256()
        self._step = self._contents

    def _contents(self, view: memoryview) -> int:
        parser, writer = self._parser, self._writer
        assert parser is not None
        assert writer is not None
        used = parser.feed(view)
        self._received.update(view[:used])
        if writer.error is not None:
            raise writer.error
        if parser.done:
            writer.finish()
            self._nar_hash = self._received.digest()
            self._nar_size = parser.consumed
            self._parser = None
            self._reader = export.DescriptionReader()
            self._step = self._describe
        return used

    def _describe(self, view: memoryview) -> int:
        value, used = self._read(self._reader, view)
        if isinstance(value, Description):
            self._received.update(self._pending)
            self._pending.clear()
            self._description = value
            self._step = self._ask_signature
        return used

    def _ask_signature(self, view: memoryview) -> int:
        value, used = self._read(wire.INT, view)
        if value is not MORE:
            self._pending.clear()
            assert self._description is not None
            if value != 1:
                path = self._description.path
                raise SignatureError(f"the archive of '{path}' lacks a signature")
            self._step = self._verify
        return used

    def _verify(self, view: memoryview) -> int:
        value, used = self._read(_SIGNATURE, view)
        if isinstance(value, bytes):
            self._pending.clear()
            self._check(value)
            self._step = self._between
        return used

    def _check(self, signature: bytes) -> None:
        described, writer = self._description, self._writer
        assert described is not None
        assert writer is not None
        signed = verify(signature, self._acl)
        if signed != self._received.digest():
            raise CorruptSignature(
                f"the archive of '{described.path}' is corrupt: its signature is for something else"
            )
        writer.share_root(self._nar_hash)
        self._writer = None
        item = Registration(
            described.path,
            self._nar_hash,
            self._nar_size,
            frozenset(described.references),
            described.deriver,
        )
        self.arrived.append(Arrival(self._staging, item))
        reached("import.verified")


_SIGNATURE = wire.Bytes(export.MAX_SIGNATURE)
