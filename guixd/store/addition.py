"""One addition to the store in progress: an archive in, files and hashes out (spec: store §4).

Checking, hashing and writing happen in one pass over each block.  Only the
syntax of the archive is an error at once; whatever else is wrong is kept for
`Addition.result`, since the archive must be read to its end to find the next request.
"""

from __future__ import annotations

import hashlib

from guixd.errors import BadArchive, GuixdError, StoreError
from guixd.formats import hashes, nar
from guixd.formats.derivation import Derivation
from guixd.formats.path import DERIVATION_SUFFIX, StoreDirectory, StorePath, check_name
from guixd.store.links import Links
from guixd.store.removal import remove_path
from guixd.store.restore import TreeWriter

MOST_DERIVATION = 64 * 1024 * 1024
"""Bytes of the largest derivation that is kept in memory to be read."""


class Addition:
    """What AddToStore (op 7) receives, on its way into the store.

    :ivar name: the wanted name.
    :ivar staging: where the files are put: mode, time and owner as they shall be.
    :ivar complete: whether the archive has been read to its end.
    :ivar nar_hash: sha256 of the archive that the files make; once complete.
    :ivar nar_size: the size of that archive in bytes; once complete.
    :ivar links: where its files are shared with equal ones, if they are.
    :ivar derivation: what was read from it, if it is a derivation that was read and checked.
    """

    def __init__(
        self,
        store: StoreDirectory,
        staging: str,
        name: str,
        algorithm: str,
        recursive: bool,
        *,
        links: Links | None = None,
        refused: GuixdError | None = None,
    ) -> None:
        """Prepare for an archive.

        :param staging: a name that does not exist, directly in the store directory.
        :param name: the wanted name; tested here, reported by `result`.
        :param algorithm: of the hash in the name; tested likewise.
        :param recursive: whether the hash is that of the archive, not of a file's contents.
        :param links: where the files are shared with equal ones; closed in the end.
        :param refused: why nothing is to be written; reported by `result`.
        """
        self.staging = staging
        self.complete = False
        self.nar_hash = b""
        self.nar_size = 0
        self.derivation: Derivation | None = None
        self._store = store
        self.name = name
        self._algorithm = algorithm
        self._recursive = recursive
        self._path: StorePath | None = None
        self._received = hashlib.sha256()
        self._wanted: hashes.Hash | None = None  # the hash in the name, if another one
        self.links = links
        self._writer = TreeWriter(None, staging, links)
        self._error: GuixdError | None = None
        try:
            if refused is not None:
                raise refused
            check_name(name)
            if not recursive or algorithm != "sha256":
                self._wanted = hashes.new(algorithm)
        except GuixdError as error:
            self._error = error
            self._writer.pass_over()
        self._file: _SingleFile | None = None
        if not recursive or name.endswith(DERIVATION_SUFFIX):
            self._file = _SingleFile(
                self._writer,
                only=not recursive,
                digest=None if recursive else self._wanted,
                keep=name.endswith(DERIVATION_SUFFIX),
            )
        self._parser = nar.NarParser(self._file or self._writer)

    def feed(self, data: bytes | memoryview) -> int:
        """Take in DATA and return how many of its bytes belong to the archive.

        Blocks while writing; may run in any one thread at a time.

        :raises BadArchive: the bytes are no canonical archive.
        """
        try:
            used = self._parser.feed(data)
        except BadArchive:
            self._writer.pass_over()
            raise
        part = data if used == len(data) else memoryview(data)[:used]
        self._received.update(part)
        if self._recursive and self._wanted is not None:
            self._wanted.update(part)
        if self._parser.done and not self.complete:
            self._end()
        return used

    def _end(self) -> None:
        self.complete = True
        self.nar_hash = self._received.digest()
        self.nar_size = self._parser.consumed
        try:
            if self._error is not None:
                raise self._error
            if self._file is not None:
                self._file.check()
                if self._file.plain is not None:
                    self.nar_hash = self._file.plain.digest()
                    self.nar_size = nar.file_size(self._file.size)
            self._writer.finish()
            self._writer.share_root(self.nar_hash)
            digest = self.nar_hash if self._wanted is None else self._wanted.digest()
            self._path = self._store.fixed_path(self.name, self._algorithm, self._recursive, digest)
        except GuixdError as error:
            self._error = error
        self._close()

    def _close(self) -> None:
        self._writer.close()
        if self.links is not None:
            self.links.close()

    def result(self) -> StorePath:
        """Return the path of the item, whose files are complete in the staging place.

        :raises GuixdError: the name, the algorithm, the kind of file or the file
            system stood against it; or the archive is not complete.
        """
        if self._error is not None:
            raise self._error
        if self._path is None:
            raise StoreError("the archive to add is not complete")
        return self._path

    @property
    def path(self) -> StorePath:
        """What `result` returns."""
        return self.result()

    @property
    def derivation_text(self) -> bytes | None:
        """The contents, if the name ends in `.drv` and there is one file up to 64 MiB."""
        if self._file is None or not self.complete or self._error is not None:
            return None
        return self._file.text

    def discard(self) -> None:
        """Remove what was written, if it is still in the staging place.

        :raises StoreError: that failed.
        """
        self._close()
        remove_path(self.staging)


class _SingleFile:
    """A `NarSink` in front of a `TreeWriter` that takes a look at a single file."""

    def __init__(
        self, writer: TreeWriter, *, only: bool, digest: hashes.Hash | None, keep: bool
    ) -> None:
        """Prepare.

        :param only: whether only a single file is right; it loses its executable bit then.
        :param digest: what to update with its contents.
        :param keep: whether to keep its contents.
        """
        self.size = 0
        self.plain: hashes.Hash | None = None
        """The hash of the archive without the executable bit, if it had one."""
        self._writer = writer
        self._only = only
        self._digest = digest
        self._keep = keep
        self._text: bytearray | None = None
        self._is_file = False

    def check(self) -> None:
        """Raise StoreError if a single file was wanted and is not what came."""
        if self._only and not self._is_file:
            raise StoreError("regular file expected, but the archive holds something else")

    @property
    def text(self) -> bytes | None:
        return None if self._text is None else bytes(self._text)

    def file(self, name: bytes, executable: bool, size: int) -> None:
        if not name:
            self._is_file = True
            self.size = size
            if self._keep and size <= MOST_DERIVATION:
                self._text = bytearray()
            if executable and self._only:
                executable = False
                self.plain = hashlib.sha256(nar.MAGIC + nar.file_header(size))
        self._writer.file(name, executable, size)

    def data(self, view: memoryview) -> None:
        if self._digest is not None:
            self._digest.update(view)
        if self.plain is not None:
            self.plain.update(view)
        if self._text is not None:
            self._text += view
        self._writer.data(view)

    def end_file(self) -> None:
        if self.plain is not None:
            self.plain.update(nar.padding(self.size) + nar.CLOSE)
        self._writer.end_file()

    def directory(self, name: bytes) -> None:
        if self._only:
            self._writer.pass_over()
        self._writer.directory(name)

    def end_directory(self) -> None:
        self._writer.end_directory()

    def symlink(self, name: bytes, target: bytes) -> None:
        if self._only:
            self._writer.pass_over()
        self._writer.symlink(name, target)
