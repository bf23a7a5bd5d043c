"""A store that is mounted read-only for everybody else (spec: store §7.1; mount(2)).

Administrators bind-mount the store read-only onto itself, so that nobody
changes it by accident.  A daemon that runs as root makes it writable in a
mount namespace of its own.
"""

from __future__ import annotations

import os

from guixd.sandbox import kernel

_MS_SLAVE = 1 << 19
_ST_SAME_AS_MS = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME


def is_read_only(store: str) -> bool:
    """Whether STORE exists and is mounted read-only."""
    try:
        return bool(os.statvfs(store).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def make_writable(store: str) -> bool:
    """Give this process a view of its own in which STORE can be written to.

    Only for root, and before there are threads, since each has its own view.

    :return: whether anything had to be done.
    :raises OSError: it was not possible, such as on a medium that is read-only.
    """
    if os.geteuid() != 0 or not is_read_only(store):
        return False
    kernel.unshare(kernel.NEWNS)
    # What is mounted elsewhere later shall still be seen here, not the other way round.
    kernel.mount("none", "/", flags=_MS_SLAVE | kernel.MS_REC)
    kept = os.statvfs(store).f_flag & _ST_SAME_AS_MS
    kernel.mount("none", store, flags=kept | kernel.MS_REMOUNT | kernel.MS_BIND)
    return True
