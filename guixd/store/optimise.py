"""Sharing the equal files of items that have their places already (op 34; spec: store §9)."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from guixd.errors import StoreError
from guixd.store.descent import DIRECTORY_FLAGS, Descent
from guixd.store.links import (
    BLOCK,
    FILE_FLAGS,
    POOL,
    SMALLEST,
    Links,
    is_shared,
    kept,
    key_of,
    key_of_small,
)


@dataclass(frozen=True, slots=True)
class Saved:
    """What sharing the files of some items has brought."""

    files: int
    """How many were replaced."""
    freed: int
    """The sum of their sizes in bytes."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""


class Optimisation:
    """Shares the files of items of one store; several threads may do parts of it.

    :param store: the file name of the store directory.
    """

    def __init__(self, store: str) -> None:
        self._store = store
        self._stopped = False
        self._known: set[int] = set()  # inodes of the pool, which need not be looked at again

    def begin(self) -> None:
        """Learn which files are in the pool already; blocks."""
        try:
            with os.scandir(f"{self._store}/{POOL}") as entries:
                self._known = {entry.inode() for entry in entries}
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError(f"cannot read the pool of links: {error.strerror}") from error

    def stop(self) -> None:
        """Let `share` come to an early end, wherever it is."""
        self._stopped = True

    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def share(self, names: Sequence[str]) -> Saved:
        """Share the files of the items with the base names NAMES; for a thread.

        :raises StoreError: the file system refuses something.
        """
        store = os.open(self._store, DIRECTORY_FLAGS & ~os.O_NOFOLLOW)
        try:
            with Links(self._store) as links:
                for name in names:
                    if self._stopped:
                        break
                    _Sharing(self, links, self._known).item(store, name)
                return Saved(links.files, links.freed, tuple(links.notes))
        finally:
            os.close(store)


class _Sharing:
    """The sharing of one item's files."""

    def __init__(self, whole: Optimisation, links: Links, known: set[int]) -> None:
        self._stopped = whole.is_stopped
        self._links = links
        self._known = known
        self._buffer: memoryview | None = None

    def item(self, store: int, name: str) -> None:
        with Descent(store) as down:
            try:
                self._item(down, name)
            except OSError as error:
                if not _exists(store, name):
                    return  # somebody has collected it
                what = down.place(error, name)
                raise StoreError(f"cannot share '{what}': {error.strerror}") from error
            except StoreError:
                if _exists(store, name):
                    raise

    def _item(self, down: Descent, name: str) -> None:
        status = os.stat(name, dir_fd=down.fd, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            self._file(down.fd, name, status)
            return
        pending = [[name]]
        while pending and not self._stopped():
            if not pending[-1]:
                pending.pop()
                if pending:
                    down.leave()
                continue
            try:
                fd = down.enter(pending[-1].pop())
            except PermissionError:  # as plain user, in a directory that is closed to all
                continue
            pending.append(self._directory(fd))

    def _directory(self, fd: int) -> list[str]:
        """Share the files of the directory FD; return the names of those in it."""
        directories: list[str] = []
        files: list[str] = []
        known = self._known
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.inode() in known:
                    continue
                if entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    directories.append(entry.name)
        large: list[tuple[str, os.stat_result]] = []
        for name in files:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if status.st_size >= SMALLEST:
                large.append((name, status))
        if large:
            with kept(fd):
                for name, status in large:
                    if self._stopped():
                        break
                    self._file(fd, name, status, is_kept=True)
        return directories

    def _file(
        self, dir_fd: int | None, name: str, status: os.stat_result, *, is_kept: bool = False
    ) -> None:
        if not is_shared(status) or (status.st_nlink > 1 and status.st_ino in self._known):
            return
        fd = os.open(name, FILE_FLAGS, dir_fd=dir_fd)
        try:
            status = os.fstat(fd)
            if not is_shared(status):
                return
            if status.st_size <= BLOCK:
                key = key_of_small(fd, status)
            else:
                if self._buffer is None:
                    self._buffer = memoryview(bytearray(BLOCK))
                key = key_of(fd, status, self._buffer, self._stopped)
        finally:
            os.close(fd)
        if key is None:
            return
        if not self._links.share(dir_fd, name, key, status, is_kept=is_kept):
            self._known.add(status.st_ino)


def _exists(store: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=store, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
