"""Removing what nobody uses from the pool of shared files (spec: gc §8)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from guixd.errors import StoreError
from guixd.formats.sizes import size_text
from guixd.store.descent import DIRECTORY_FLAGS
from guixd.store.links import POOL, SMALLEST


def clean_pool(store: str, report: Callable[[str], None], is_stopped: Callable[[], bool]) -> int:
    """Remove the files of the pool that no item has; for a thread.

    :param store: the store directory.
    :param report: gets a line for the user about what sharing saves.
    :return: the sum of the sizes of what was removed, in bytes.
    """
    freed = actual = unshared = 0
    try:
        fd = os.open(f"{store}/{POOL}", DIRECTORY_FLAGS)
    except FileNotFoundError:
        return 0
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                if is_stopped():
                    return freed
                # Who shares a file at this moment finds it gone and puts it there again.
                with suppress(FileNotFoundError):
                    status = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
                    if status.st_nlink == 1 or status.st_size < SMALLEST:
                        os.unlink(entry.name, dir_fd=fd)
                        freed += status.st_size
                    else:
                        actual += status.st_size
                        unshared += (status.st_nlink - 1) * status.st_size
        saved = unshared - actual - os.fstat(fd).st_size
    except OSError as error:
        raise StoreError(f"cannot clean the pool of shared files: {error.strerror}") from error
    finally:
        os.close(fd)
    report(f"note: currently hard linking saves {size_text(saved)}")
    return freed
