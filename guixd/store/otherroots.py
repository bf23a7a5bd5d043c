"""Temporary roots of other processes, as a collector sees them (spec: gc §4)."""

from __future__ import annotations

import os
from collections.abc import Callable

from guixd.errors import NotInStore, StoreError
from guixd.formats.path import StoreDirectory, StorePath
from guixd.store.locks import lock_descriptor, mark_removed

MOST_BYTES = 1 << 30
"""A file longer than this is not read."""


class OtherRoots:
    """What sessions of other daemons protect; they add nothing until `close`.

    :ivar paths: the store paths, valid or not.
    """

    def __init__(self) -> None:
        self.paths: set[StorePath] = set()
        self._held: list[int] = []

    def read(
        self,
        directory: str,
        own: str,
        store: StoreDirectory,
        report: Callable[[str], None],
    ) -> None:
        """Read all files in DIRECTORY but our own, waiting for who writes one; for a thread.

        Those whose owner is dead are removed.  Only with the collector's lock.

        :param own: what the names of our own begin with.
        :param report: gets lines for the user.
        :raises StoreError: a file cannot be read, or holds what is no store path.
        """
        try:
            for name in sorted(os.listdir(directory)):
                if not name.startswith(own):
                    self._read(f"{directory}/{name}", store, report)
        except OSError as error:
            raise StoreError(
                f"cannot read temporary roots '{error.filename or directory}': {error.strerror}"
            ) from error

    def _read(self, file: str, store: StoreDirectory, report: Callable[[str], None]) -> None:
        try:
            fd = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        try:
            if lock_descriptor(fd, exclusive=True):
                report(f"removing stale temporary roots file '{file}'")
                os.unlink(file)
                mark_removed(fd)
                os.close(fd)
                return
            lock_descriptor(fd, exclusive=False, wait=True)
            size = os.fstat(fd).st_size
            if size > MOST_BYTES:
                raise StoreError(f"the temporary roots file '{file}' is too long")
            for entry in os.pread(fd, size, 0).split(b"\0")[:-1]:
                try:
                    self.paths.add(store.parse(entry.decode("utf-8", "surrogateescape")))
                except NotInStore:
                    raise StoreError(
                        f"the temporary roots file '{file}' is corrupt: it names"
                        f" '{os.fsdecode(entry)}', which is not in the store"
                    ) from None
        except BaseException:
            os.close(fd)
            raise
        self._held.append(fd)

    def close(self) -> None:
        """Let the others add roots again."""
        held, self._held = self._held, []
        for fd in held:
            os.close(fd)
