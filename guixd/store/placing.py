"""Putting complete files where an item belongs, whatever is there."""

from __future__ import annotations

import os
from collections.abc import Callable

from guixd.errors import StoreError
from guixd.formats.path import StorePath
from guixd.store.staging import unused_name


def write_item(path: StorePath, text: bytes, is_valid: Callable[[StorePath], bool]) -> bool:
    """Make the file PATH, with the mode and time of all items, whatever is there.

    :return: whether that was necessary, as it was not valid.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            fd = os.open(path, flags, 0o444)
        except FileExistsError:
            if is_valid(path):
                return False
            _clear(path)
            fd = os.open(path, flags, 0o444)
        try:
            done = os.write(fd, text)
            while done < len(text):
                done += os.write(fd, text[done:])
            os.fchmod(fd, 0o444)
            os.utime(fd, (1, 1))
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        raise StoreError(f"cannot write '{path}': {error.strerror}") from error
    return True


def move(staging: str, path: StorePath) -> None:
    """Call what is at STAGING PATH, whatever is there."""
    try:
        if os.path.lexists(path):
            _clear(path)
        os.rename(staging, path)
    except OSError as error:
        raise StoreError(f"cannot make '{path}': {error.strerror}") from error


def _clear(path: StorePath) -> None:
    """Take away what lies at PATH though it is not valid."""
    try:
        os.unlink(path)
    except IsADirectoryError:
        # Removing a tree can take long.  Under its new name a collector removes it.
        store = os.path.dirname(path)
        os.rename(path, f"{store}/{unused_name(store)}")
