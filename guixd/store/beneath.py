"""Opening what lies below a directory and nowhere else (spec: sandbox §10 I-PATH)."""

from __future__ import annotations

import ctypes
import os
import struct
from errno import EAGAIN, ENOSYS, EPERM
from functools import cache

_OPENAT2 = 437  # on every architecture
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
_ATTEMPTS = 16


def open_beneath(
    dir_fd: int, path: str, flags: int = os.O_RDONLY | os.O_DIRECTORY, *, plain: bool = False
) -> int:
    """Open PATH, relative to and below DIR_FD, following no symbolic link at all.

    :param path: components and slashes; empty ones and `.` are passed over.
    :param flags: of open(2); close-on-exec and no-follow are added.
    :param plain: whether to do it component by component, without openat2(2).
    :return: a descriptor that is the caller's.
    :raises OSError: as open(2) does; ELOOP, ENOTDIR or EXDEV for what leads astray.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise PermissionError(EPERM, "a file name with '..'", path)
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    name = "/".join(parts) or "."
    if not plain and len(name) < 4096:
        for _ in range(_ATTEMPTS):
            result = _openat2(dir_fd, name, flags)
            if result >= 0:
                return result
            if -result in (ENOSYS, EPERM):  # an old kernel, or a filter of system calls
                break
            if -result != EAGAIN:
                raise OSError(-result, os.strerror(-result), path)
    return _open_stepwise(dir_fd, parts, flags)


def _open_stepwise(dir_fd: int, parts: list[str], flags: int) -> int:
    current = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        for part in parts[:-1]:
            inner = os.open(
                part,
                os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                dir_fd=current,
            )
            os.close(current)
            current = inner
        return os.open(parts[-1] if parts else ".", flags, dir_fd=current)
    finally:
        os.close(current)


def _openat2(dir_fd: int, name: str, flags: int) -> int:
    """Return a descriptor, or minus the error's number."""
    how = struct.pack("=QQQ", flags, 0, _RESOLVE)
    result = int(
        _libc().syscall(
            ctypes.c_long(_OPENAT2),
            ctypes.c_int(dir_fd),
            ctypes.c_char_p(os.fsencode(name)),
            ctypes.c_char_p(how),
            ctypes.c_size_t(len(how)),
        )
    )
    return result if result >= 0 else -ctypes.get_errno()


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library
