"""Locks that hold against other daemons and between our own sessions (spec: store §10).

They are open-file-description locks: other daemons' record locks conflict with them,
but closing another descriptor of the same file does not lose them, and two
descriptors in this process exclude each other.

The big lock has a second use.  Every session of another daemon holds it shared for its
whole life, and so do we.  For the few microseconds of a small addition we make ours
exclusive, without waiting: the kernel does that in one step or leaves the shared lock
as it is.  Success proves that no foreign session exists and keeps new ones from
starting, so that a path lock file would protect against nobody.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Iterable
from errno import EACCES, EAGAIN, EINTR, ENAMETOOLONG

from guixd.errors import StoreError
from guixd.faults import reached

_LONGEST_NAME = 255
_STALE = b"d"
# Linux numbers them alike everywhere; `fcntl` names them in CPython 3.9 and later.
_GETLK, _SETLK, _SETLKW = fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW


def _flock(kind: int) -> bytes:
    # struct flock: type, whence, start, length (0: to the end), process (0 for these locks).
    return struct.pack("@hhqqi0q", kind, os.SEEK_SET, 0, 0, 0)


_READ, _WRITE, _NONE = _flock(fcntl.F_RDLCK), _flock(fcntl.F_WRLCK), _flock(fcntl.F_UNLCK)


def lock_descriptor(fd: int, *, exclusive: bool, wait: bool = False) -> bool:
    """Lock the whole file of FD, or change the lock that FD has, in one step.

    :param wait: block until it is possible; only in a thread.
    :return: whether it was; if not, the lock that FD had is still there.
    """
    request = _WRITE if exclusive else _READ
    while True:
        try:
            fcntl.fcntl(fd, _SETLKW if wait else _SETLK, request)
        except OSError as error:
            if error.errno in (EAGAIN, EACCES) and not wait:
                return False
            if error.errno != EINTR:
                raise
        else:
            return True


def unlock_descriptor(fd: int) -> None:
    """Give up the lock that FD has on its file."""
    fcntl.fcntl(fd, _SETLK, _NONE)


def is_locked(path: str) -> bool:
    """Whether somebody has a lock on the file PATH; not so if it cannot be opened.

    Nobody who watches the file for the end of locks takes the look for one.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except OSError:
        return False
    try:
        found = fcntl.fcntl(fd, _GETLK, _WRITE)
    except OSError:
        return False
    finally:
        os.close(fd)
    return bool(struct.unpack_from("h", found)[0] != fcntl.F_UNLCK)


def open_lock_file(path: str) -> int:
    """Open or make the lock file PATH, mode 0600, and return its descriptor.

    :raises StoreError: it cannot be opened, or is no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise StoreError(f"cannot open lock file '{path}': {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StoreError(f"lock file '{path}' is not a regular file")
    return fd


def lock_file(path: str) -> str:
    """Return the name of the lock file of the item PATH."""
    return path + ".lock"


def check_lockable(path: str) -> None:
    """Test whether a lock file can be made for PATH, even if none is needed at the moment.

    :raises StoreError: its name is too long; no daemon could make the item at another time.
    """
    if len(os.fsencode(os.path.basename(lock_file(path)))) > _LONGEST_NAME:
        raise StoreError(f"cannot make '{path}': {os.strerror(ENAMETOOLONG)}")


class FileLock:
    """A lock file that stays: the big lock, the collector's lock, a build user's lock.

    :param path: the file, made with mode 0600 when it is first locked.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self, *, exclusive: bool) -> bool:
        """Take the lock, or change the mode of the one held, in one step, without waiting.

        :return: whether it was; if not, what was held before is still held.
        :raises StoreError: the file cannot be opened or locked.
        """
        if self._fd is None:
            self._fd = open_lock_file(self.path)
        try:
            return lock_descriptor(self._fd, exclusive=exclusive)
        except OSError as error:
            raise StoreError(f"cannot lock '{self.path}': {error.strerror}") from error

    def release(self) -> None:
        """Give the lock up but keep the file open."""
        if self._fd is not None:
            unlock_descriptor(self._fd)

    def close(self) -> None:
        """Give the lock up, if held, and close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def try_alone(self) -> bool:
        """Make the shared lock that is held exclusive, if nobody else has it.

        :return: whether that was possible; then `share` must follow soon, without waiting.
        """
        return self._fd is not None and lock_descriptor(self._fd, exclusive=True)

    def share(self) -> None:
        """Make the exclusive lock that is held shared again."""
        if self._fd is not None:
            lock_descriptor(self._fd, exclusive=False)


class PathLocks:
    """The lock files of some store paths, held.  For the reactor's thread.

    A lock file may vanish while somebody waits for it.  Whoever removes it writes a
    byte into it first, so that those who get the lock on the removed file see it and
    start again; otherwise a third one could lock a new file of the same name meanwhile.
    """

    _held: set[str] = set()

    def __init__(self) -> None:
        self._files: list[tuple[str, int]] = []

    @classmethod
    def acquire(cls, paths: Iterable[str]) -> PathLocks | None:
        """Lock all of PATHS, in the order that everybody uses, without waiting.

        :return: `None` if somebody in this or another process has one of them.
        :raises StoreError: a lock file cannot be made.
        """
        names = sorted({lock_file(path) for path in paths}, key=os.fsencode)
        if not cls._held.isdisjoint(names):
            return None
        cls._held.update(names)
        locks = cls()
        complete = False
        try:
            for name in names:
                fd = _lock_path(name)
                if fd is None:
                    return None
                locks._files.append((name, fd))
            complete = True
            reached("locks.taken")
            return locks
        finally:
            if not complete:
                for _, fd in locks._files:
                    os.close(fd)
                cls._held.difference_update(names)

    @classmethod
    def is_held(cls, path: str) -> bool:
        """Whether this process has the lock of PATH."""
        return lock_file(path) in cls._held

    def release(self, delete: bool) -> None:
        """Give the locks up; nothing happens the second time.

        :param delete: remove the files; only right when the paths are valid.
        """
        files, self._files = self._files, []
        for name, fd in files:
            try:
                if delete:
                    try:
                        os.unlink(name)
                    except FileNotFoundError:
                        pass
                    reached("locks.removed")
                    mark_removed(fd)
            finally:
                os.close(fd)
        self._held.difference_update(name for name, _ in files)


def mark_removed(fd: int) -> None:
    """Let who has opened the file FD, which was unlinked, see that; on a full disk, too."""
    try:
        os.write(fd, _STALE)
    except OSError:
        os.truncate(fd, len(_STALE))


def _lock_path(name: str) -> int | None:
    while True:
        fd = open_lock_file(name)
        locked = False
        try:
            if not lock_descriptor(fd, exclusive=True):
                return None
            locked = os.fstat(fd).st_size == 0
            if locked:
                return fd
        except OSError as error:
            raise StoreError(f"cannot lock '{name}': {error.strerror}") from error
        finally:
            if not locked:
                os.close(fd)
