"""Recursive removal that nobody can lead astray (spec: gc §3, sandbox §11 CVE-2025-46415)."""

from __future__ import annotations

import os
import stat
from errno import EBUSY, ELOOP, ENOTDIR, ENOTEMPTY

from guixd.errors import StoreError
from guixd.store.descent import DIRECTORY_FLAGS, Check, Descent, go_on, open_directory

_ATTEMPTS = 1000
_A_MOMENT = 100
"""How many nodes `remove_small` removes at most; large ones count for several."""
_PAGE = 4096


def remove(dir_fd: int | None, name: str, *, max_links: int = 1, check: Check = go_on) -> int:
    """Remove NAME of the directory DIR_FD and all below it; a missing one is no error.

    Directories are entered by descriptors only, so that whoever exchanges names
    meanwhile at worst keeps something of his own.

    :param dir_fd: None if NAME is a file name whose directories can be trusted.
    :param max_links: link count up to which a file's size counts as freed.
    :param check: called for each node; what it keeps from being removed stays.
    :return: bytes freed (spec: gc §7): sizes of files and links, not directories.
    :raises StoreError: something could not be removed.
    """
    with Descent(dir_fd) as down:
        try:
            return _remove(down, name, max_links, check)
        except OSError as error:
            what = down.place(error, name)
            raise StoreError(f"cannot delete '{what}': {error.strerror}") from error


def remove_path(path: str, *, max_links: int = 1) -> int:
    """Remove the file or tree PATH, whose directories can be trusted; see `remove`."""
    return remove(None, path, max_links=max_links)


def remove_small(dir_fd: int | None, name: str) -> bool:
    """Remove the directory NAME as `remove` does, if there is so little that it is done at once.

    :return: whether it is gone; if not, the rest is for `remove`, in a thread.
    """
    try:
        _remove_little(dir_fd, name, _A_MOMENT)
    except OSError:
        return False
    return True


def _remove_little(dir_fd: int | None, name: str, left: int) -> int:
    """Remove a directory if that costs at most LEFT, which bounds the depth, too.

    :return: what is left of LEFT.
    :raises OSError: it costs more, or is not simple.
    """
    fd = os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)
    try:
        left -= os.fstat(fd).st_size // _PAGE
        _check(left)
        with os.scandir(fd) as listing:
            entries = list(listing)
        for entry in entries:
            left -= 1
            if not entry.is_dir(follow_symlinks=False):
                left -= _weight(entry.stat(follow_symlinks=False))
                _check(left)
                os.unlink(entry.name, dir_fd=fd)
                continue
            _check(left)
            try:
                os.rmdir(entry.name, dir_fd=fd)  # many are empty
            except OSError:
                left = _remove_little(fd, entry.name, left)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=dir_fd)
    return left


def _weight(status: os.stat_result) -> int:
    """Return for how many nodes a file with STATUS counts: blocks may lie beyond its end."""
    return max(status.st_size, status.st_blocks * 512) // _PAGE


def _check(left: int) -> None:
    if left < 0:
        raise OSError(EBUSY, "too much")


def _remove(down: Descent, name: str, max_links: int, check: Check) -> int:
    freed = 0
    left = _ATTEMPTS  # against names that are exchanged again and again
    pending: list[list[str]] = [[name]]
    while True:
        while pending[-1]:
            check()
            entry = pending[-1][-1]
            fd = down.fd
            try:
                status = os.stat(entry, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(_enter(down, entry))
                    continue
                os.unlink(entry, dir_fd=fd)
                if status.st_nlink <= max_links:
                    freed += status.st_size
            except FileNotFoundError:
                pass
            except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
                left -= 1
                if not left or isinstance(error, PermissionError):
                    raise
                continue
            except OSError as error:
                left -= 1
                if not left or error.errno != ELOOP:
                    raise
                continue
            pending[-1].pop()
        pending.pop()
        if not pending:
            return freed
        down.leave()
        try:
            os.rmdir(pending[-1][-1], dir_fd=down.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            left -= 1
            if not left or error.errno not in (ENOTDIR, ENOTEMPTY):
                raise
            continue  # look again at what the name is now
        pending[-1].pop()


def _enter(down: Descent, name: str) -> list[str]:
    """Enter the directory NAME, make it writable for us, and list it."""
    fd = open_directory(name, down.fd)
    down.push(fd, name)
    mode = os.fstat(fd).st_mode
    if mode & 0o700 != 0o700:
        try:
            os.fchmod(fd, stat.S_IMODE(mode) | 0o700)
        except PermissionError:
            pass  # not ours; perhaps we may write all the same
    return os.listdir(fd)
