"""Recursive removal that nobody can lead astray (spec: gc §3, sandbox §11 CVE-2025-46415)."""

from __future__ import annotations

import os
import stat
from errno import ELOOP, ENOTDIR, ENOTEMPTY

from guixd.errors import StoreError
from guixd.store.descent import Descent, open_directory

_ATTEMPTS = 1000


def remove(dir_fd: int | None, name: str, *, max_links: int = 1) -> int:
    """Remove NAME of the directory DIR_FD and all below it; a missing one is no error.

    Directories are entered by descriptors only, so that whoever exchanges names
    meanwhile at worst keeps something of his own.

    :param dir_fd: None if NAME is a file name whose directories can be trusted.
    :param max_links: link count up to which a file's size counts as freed.
    :return: bytes freed (spec: gc §7): sizes of files and links, not directories.
    :raises StoreError: something could not be removed.
    """
    with Descent(dir_fd) as down:
        try:
            return _remove(down, name, max_links)
        except OSError as error:
            what = down.path(error.filename if isinstance(error.filename, str) else name)
            raise StoreError(f"cannot delete '{what}': {error.strerror}") from error


def remove_path(path: str, *, max_links: int = 1) -> int:
    """Remove the file or tree PATH, whose directories can be trusted; see `remove`."""
    return remove(None, path, max_links=max_links)


def _remove(down: Descent, name: str, max_links: int) -> int:
    freed = 0
    left = _ATTEMPTS  # against names that are exchanged again and again
    pending: list[list[str]] = [[name]]
    while True:
        while pending[-1]:
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
