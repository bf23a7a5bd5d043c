"""Giving files and trees other names, relative to directories that are open."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from errno import EINVAL, ENOSYS
from functools import cache

from guixd.store.descent import DIRECTORY_FLAGS

_RENAME_EXCHANGE = 2


def exists(directory: int, name: str) -> bool:
    """Whether the directory DIRECTORY has an entry NAME."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def move(source: int, name: str, target: int, new: str) -> None:
    """Rename NAME of one directory to NEW of another; as a plain user that may need its mode."""
    try:
        os.rename(name, new, src_dir_fd=source, dst_dir_fd=target)
    except PermissionError:
        with _writable(source, name):
            os.rename(name, new, src_dir_fd=source, dst_dir_fd=target)


def exchange(source: int, name: str, target: int, other: str) -> bool:
    """Let NAME of one directory and OTHER of another change places, in one step.

    :return: whether it was done; false if the system cannot do that.
    :raises OSError: one of them is missing, or another reason.
    """
    with ExitStack() as modes:
        if source != target:
            modes.enter_context(_writable(source, name))
            modes.enter_context(_writable(target, other))
        number = _exchange(source, os.fsencode(name), target, os.fsencode(other))
    if number in (ENOSYS, EINVAL):
        return False
    if number:
        raise OSError(number, os.strerror(number), name, None, other)
    return True


@contextmanager
def _writable(directory: int, name: str) -> Iterator[None]:
    """Make it possible for the owner of a directory NAME to move it, for a while."""
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & stat.S_IWUSR or os.geteuid() == 0:
        yield
        return
    fd = os.open(name, DIRECTORY_FLAGS, dir_fd=directory)
    try:
        os.fchmod(fd, 0o700)
        try:
            yield
        finally:
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
    finally:
        os.close(fd)


def _exchange(source: int, name: bytes, target: int, other: bytes) -> int:
    """Return 0, or the number of the error."""
    try:
        renameat2 = _libc().renameat2
    except AttributeError:
        return ENOSYS
    result = renameat2(
        ctypes.c_int(source),
        ctypes.c_char_p(name),
        ctypes.c_int(target),
        ctypes.c_char_p(other),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )
    return ctypes.get_errno() if result else 0


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
