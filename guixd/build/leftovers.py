"""Build trees of daemons that died with their builds (spec: sandbox §3).

A tree that belongs to a running build has a mode that no other directory has, and is
locked by its daemon.  The lock ends with the daemon, the mode when the tree is kept.
Builds without a container would see that mode, so that their trees are not found.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time

from guixd.errors import StoreError
from guixd.store.descent import DIRECTORY_FLAGS, Check, go_on
from guixd.store.removal import remove

RUNNING = 0o1700
"""The mode of a tree whose build runs."""
_OLD = 60
"""Seconds in which who has made a tree has surely locked it."""
_NAME = re.compile(r"guix-build-.+-[0-9]+")


def claim(tree: int) -> None:
    """Say that the build of the directory TREE, a descriptor that stays open, runs."""
    fcntl.flock(tree, fcntl.LOCK_SH)


def remove_leftovers(temporary: str, gid: int | None = None, check: Check = go_on) -> list[str]:
    """Remove the build trees in the directory TEMPORARY whose daemons have died; blocks.

    :param gid: the group of build users, who have the trees of downloads.
    :param check: called for each node; what it keeps from being removed stays.
    :return: what stands against the removal of some, for the log.
    """
    problems = []
    try:
        names = [name for name in os.listdir(temporary) if _NAME.fullmatch(name)]
    except OSError as error:
        return [f"cannot read '{temporary}': {error.strerror}"]
    for name in names:
        try:
            _remove_leftover(f"{temporary}/{name}", gid, check)
        except (OSError, StoreError) as error:
            problems.append(f"cannot remove '{temporary}/{name}': {error}")
    return problems


def _remove_leftover(tree: str, gid: int | None, check: Check) -> None:
    try:
        fd = os.open(tree, DIRECTORY_FLAGS)
    except OSError:
        return  # somebody else's, or gone
    try:
        status = os.fstat(fd)
        ours = status.st_uid == os.geteuid() or status.st_gid == gid
        if not ours or stat.S_IMODE(status.st_mode) != RUNNING:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        # Who makes a tree locks it before he puts something into it; he may be about to.
        if os.listdir(fd) or status.st_mtime < time.time() - _OLD:
            remove(None, tree, check=check)
    finally:
        os.close(fd)
