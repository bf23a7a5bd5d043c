"""A substitute on its way into the store (spec: substitutes §7, §8, §10).

Its bytes come from strangers; only what a signature says of them is known.  The files
lie under a name of their own until all of it has been compared.
"""

from __future__ import annotations

import hashlib
import os

from guixd.errors import BadArchive, StoreError, WrongHash
from guixd.faults import reached
from guixd.formats import hashes
from guixd.formats.nar import NarParser
from guixd.formats.path import StorePath
from guixd.store.descent import DIRECTORY_FLAGS
from guixd.store.items import Registration
from guixd.store.links import Links
from guixd.store.local import LocalStore
from guixd.store.moves import exchange
from guixd.store.removal import remove_path
from guixd.store.restore import TreeWriter


class Incoming:
    """One archive, checked, hashed and written in one pass.

    All methods but `commit` block; one thread at a time may use it.

    :ivar path: the item that it shall be.
    :ivar staging: where the files are put: mode, time and owner as they shall be.
    :ivar complete: whether the whole archive has come and is what it should be.
    :ivar nar_hash: its sha256, once it is complete.
    :ivar nar_size: its size in bytes.
    """

    def __init__(
        self,
        store: LocalStore,
        path: StorePath,
        algorithm: str,
        digest: bytes,
        size: int,
        links: Links | None = None,
    ) -> None:
        """Prepare for an archive of SIZE bytes with the given DIGEST.

        Other than the other methods this one, and `commit`, are for the store's thread.

        :param links: where the files are shared with equal ones; closed in the end.
        :raises BadHash: the algorithm is unknown.
        :raises Busy: another process collects.
        """
        self._other = None if algorithm == "sha256" else hashes.new(algorithm)
        self._store = store
        self.path = path
        self.staging = store.staging.take()
        self.complete = False
        self.nar_hash = b""
        self.nar_size = size
        self._algorithm = algorithm
        self._digest = digest
        self._links = links
        self._writer = TreeWriter(None, self.staging, links)
        self._parser = NarParser(self._writer)
        self._sha256 = hashlib.sha256()
        self._received = 0

    @property
    def left(self) -> int:
        """How many bytes are still to come."""
        return self.nar_size - self._received

    def feed(self, data: bytes | memoryview) -> None:
        """Take DATA in.

        :raises BadArchive: the archive is malformed, or longer than it should be.
        :raises StoreError: it cannot be written.
        """
        self._received += len(data)
        if self._received > self.nar_size:
            raise BadArchive(f"the archive has more than the {self.nar_size} bytes it should have")
        self._sha256.update(data)
        if self._other is not None:
            self._other.update(data)
        if self._parser.feed(data) != len(data):
            raise BadArchive("the archive goes on behind its end")
        if self._writer.error is not None:
            raise self._writer.error
        reached("substitute.fed")

    def finish(self) -> None:
        """Compare the archive with what it should be, at its end.

        :raises WrongHash: it is another one; or BadArchive, if it is none.
        :raises StoreError: it could not be written.
        """
        self.nar_hash = self._sha256.digest()
        actual = self.nar_hash if self._other is None else self._other.digest()
        if actual != self._digest:
            expected, found = (hashes.to_base32(d) for d in (self._digest, actual))
            raise WrongHash(self.path, self._algorithm, expected, found)
        if self.left:
            raise BadArchive(f"the archive has {self._received} bytes, not {self.nar_size}")
        if not self._parser.done:
            raise BadArchive("the archive ends too early")
        self._writer.finish()
        self._writer.share_root(self.nar_hash)
        self.complete = True
        reached("substitute.unpacked")

    def commit(self, references: frozenset[StorePath], deriver: StorePath | None) -> None:
        """Make the item valid; what was there, valid or not, goes to the staging place.

        The caller has the lock of the path and has protected it.

        :raises BadDerivation: it is called a derivation but is none.
        :raises PathNotValid: something that is referred to is not valid.
        :raises Busy: another process writes to the database; try it again.
        """
        assert self.complete
        replaces = os.path.lexists(self.path)
        self._move(self.staging, self.path, replaces)
        reached("substitute.moved")
        try:
            self._store.register(
                [Registration(self.path, self.nar_hash, self.nar_size, references, deriver)]
            )
        except BaseException:
            self._move(self.path, self.staging, replaces)
            raise
        reached("substitute.registered")

    def _move(self, name: str, new: str, exchanges: bool) -> None:
        """Rename NAME, or let the two change places, in one step if the system can do that."""
        try:
            if not exchanges:
                os.rename(name, new)
            elif not self._exchange(name, new):
                aside = self._store.staging.take()
                os.rename(new, aside)
                os.rename(name, new)
                os.rename(aside, name)
                self._store.staging.free(aside)
        except OSError as error:
            raise StoreError(f"cannot make '{self.path}': {error.strerror}") from error

    def _exchange(self, one: str, other: str) -> bool:
        store = os.open(self._store.directory.path, DIRECTORY_FLAGS)
        try:
            return exchange(store, os.path.basename(one), store, os.path.basename(other))
        finally:
            os.close(store)

    def discard(self) -> None:
        """Remove what is in the staging place; to be called in any case, in the end.

        :raises StoreError: that failed.
        """
        self._writer.close()
        if self._links is not None:
            self._links.close()
        remove_path(self.staging)
        self._store.staging.free(self.staging)
