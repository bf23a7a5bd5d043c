"""Restoring a NAR below a directory, at once in the form of the store (spec: nar §3)."""

from __future__ import annotations

import os
import time

from guixd.errors import StoreError
from guixd.formats.hashes import Hash
from guixd.store.canonical import STORE_TIME
from guixd.store.descent import DIRECTORY_FLAGS, Descent
from guixd.store.links import SMALLEST, Links, end_key, start_key

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHECKED_SIZE = 1 << 20  # bytes; the free space is asked for from this size of a file


class TreeWriter:
    """A `NarSink` that creates the nodes of an archive, with the store's metadata.

    Everything is created exclusively, relative to descriptors.  An error of the
    file system stops the writing but not the archive: the rest of it is passed
    over, and `finish` raises the error.

    :ivar error: the first error, None so far.
    """

    def __init__(self, dir_fd: int | None, name: str, links: Links | None = None) -> None:
        """Prepare to create NAME in the directory DIR_FD (which stays the caller's).

        :param dir_fd: None if NAME is a file name whose directories can be trusted.
        :param links: where files are shared with others at once, in the same pass; but
            see `share_root`.
        """
        self.error: StoreError | None = None
        self._down = Descent(dir_fd)
        self._root = os.fsencode(name)
        self._file = -1
        self._name = b""
        self._mode = 0
        self._links = links
        self._size = 0
        self._key: Hash | None = None
        self._is_file = False
        self._times = (time.time_ns(), STORE_TIME)

    def directory(self, name: bytes) -> None:
        if self.error is None:
            name = name or self._root
            down = self._down
            try:
                os.mkdir(name, 0o700, dir_fd=down.fd)
                down.push(os.open(name, DIRECTORY_FLAGS, dir_fd=down.fd), name)
            except OSError as error:
                self._fail(name, error)

    def end_directory(self) -> None:
        if self.error is None:
            down = self._down
            try:
                if down.fd is not None:
                    os.fchmod(down.fd, 0o555)
                    os.utime(down.fd, ns=self._times)
                down.leave()
            except OSError as error:
                self._fail(b".", error)
            except StoreError as error:
                self.error = error
                self.close()

    def file(self, name: bytes, executable: bool, size: int) -> None:
        if self.error is None:
            if size >= SMALLEST and name and self._links is not None:
                self._key = start_key(size, executable)
            self._is_file = not name
            self._size = size
            self._name = name = name or self._root
            self._mode = mode = 0o555 if executable else 0o444
            try:
                self._file = fd = os.open(name, _CREATE, mode, dir_fd=self._down.fd)
                if size >= _CHECKED_SIZE:
                    self._check_space(fd, size)
            except OSError as error:
                self._fail(name, error)

    def data(self, view: memoryview) -> None:
        if self.error is None:
            if self._key is not None:
                self._key.update(view)
            try:
                done = os.write(self._file, view)
                while done < len(view):
                    done += os.write(self._file, view[done:])
            except OSError as error:
                self._fail(self._name, error)

    def end_file(self) -> None:
        if self.error is None:
            fd = self._file
            try:
                os.fchmod(fd, self._mode)  # whatever the umask is
                os.utime(fd, ns=self._times)
                self._file = -1
                os.close(fd)
                if self._key is not None:
                    self._share(self._down.fd, self._key)
            except OSError as error:
                self._fail(self._name, error)
            except StoreError as error:
                self.error = error
                self.close()

    def _share(self, dir_fd: int | None, key: Hash) -> None:
        assert self._links is not None
        self._key = None
        status = os.stat(self._name, dir_fd=dir_fd, follow_symlinks=False)
        self._links.share(dir_fd, self._name, end_key(key, self._size), status)

    def share_root(self, nar_hash: bytes) -> None:
        """Share the file that is the whole archive, if it is one, after `finish`.

        It is the caller who knows its key.

        :param nar_hash: the sha256 of the archive that the file makes.
        :raises StoreError: the file system refuses.
        """
        if self._links is not None and self._is_file and self._size >= SMALLEST:
            try:
                status = os.stat(self._root, dir_fd=self._down.fd, follow_symlinks=False)
            except OSError as error:
                raise StoreError(f"cannot share '{self._name!r}': {error.strerror}") from error
            self._links.share(self._down.fd, self._root, nar_hash, status)

    def symlink(self, name: bytes, target: bytes) -> None:
        if self.error is None:
            name = name or self._root
            fd = self._down.fd
            try:
                os.symlink(target, name, dir_fd=fd)
                os.utime(name, ns=self._times, dir_fd=fd, follow_symlinks=False)
            except OSError as error:
                self._fail(name, error)

    def pass_over(self) -> None:
        """Write nothing of what is still to come, since the caller has no use for it."""
        if self.error is None:
            self.error = StoreError("the archive was not wanted")
        self.close()

    def finish(self) -> None:
        """Tell that the archive is complete.

        :raises StoreError: something could not be written; what there is remains.
        """
        self.close()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Close what is open; the archive may be incomplete."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._down.close()

    def _check_space(self, fd: int, size: int) -> None:
        space = os.fstatvfs(fd)
        free = (space.f_bfree if os.geteuid() == 0 else space.f_bavail) * space.f_frsize
        if size > free:
            path = self._down.path(self._name)
            text = f"no space for file '{path}': it has {size} bytes, only {free} are free"
            self.error = StoreError(text)
            self.close()

    def _fail(self, name: bytes, error: OSError) -> None:
        self.error = StoreError(f"cannot write '{self._down.path(name)}': {error.strerror}")
        self.error.__cause__ = error
        self.close()
