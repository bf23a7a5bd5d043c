"""Makes the directories of a store and tests that they can be used (spec: store §1, §7)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from guixd.errors import StoreError
from guixd.faults import reached
from guixd.settings import Directories

RESERVED_SIZE = 8 << 20


def prepare(
    directories: Directories, *, build_gid: int | None, ignore_symlinks: bool = False
) -> None:
    """Make what is missing, with modes that do not depend on the umask.

    :param build_gid: the group of build users, if they are used.
    :param ignore_symlinks: whether the store's name may lead through symbolic links.
    :raises StoreError: something cannot be made, or the store is read-only or a link.
    """
    try:
        _prepare(directories, build_gid)
    except OSError as error:
        raise StoreError(f"cannot prepare the store: {error.filename}: {error.strerror}") from error
    if not ignore_symlinks:
        _refuse_symlinks(directories.store)


def _prepare(directories: Directories, build_gid: int | None) -> None:
    store, state = directories.store, directories.state
    _make(store, 0o755)
    if os.statvfs(store).f_flag & os.ST_RDONLY:
        raise StoreError(
            f"the store '{store}' is on a read-only mount;"
            " remount it writable for this daemon, in a mount namespace of its own"
        )
    for name in "profiles", "temproots", "userpool":
        _make(f"{state}/{name}")
    _make(directories.database)
    roots = state + "/gcroots"
    if not os.path.lexists(roots):
        _make(roots)
        reached("layout.roots")
        os.symlink(state + "/profiles", roots + "/profiles")
    _make(state + "/profiles/per-user")
    if os.geteuid() == 0 and build_gid is not None:
        os.chmod(state + "/profiles/per-user", 0o755)
        status = os.stat(store)
        if (status.st_uid, status.st_gid) != (0, build_gid):
            os.chown(store, 0, build_gid)
        if stat.S_IMODE(status.st_mode) != 0o1775:
            os.chmod(store, 0o1775)
    _make(store + "/.links")


def _make(path: str, mode: int = 0o755) -> None:
    """Make the directory PATH, and those that it lies in, unless it is there."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        try:
            os.mkdir(directory, mode)
        except FileExistsError:
            if not os.path.isdir(directory):
                raise
        else:
            os.chmod(directory, mode)


def _refuse_symlinks(store: str) -> None:
    path = store
    while path != "/":
        if os.path.islink(path):
            raise StoreError(
                f"the path '{path}' is a symlink; this is not allowed for the store"
                " and the directories that it lies in"
            )
        path = os.path.dirname(path)


def reserve_space(database: str, wanted: bool) -> None:
    """Keep 8 MiB for the database when the disk is full, or free them.

    Errors are not important: what fails here only makes a full disk harder to clean.

    :param database: the directory of the database.
    """
    name = database + "/reserved"
    try:
        if not wanted:
            os.unlink(name)
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600)
        try:
            if os.fstat(fd).st_size != RESERVED_SIZE:
                reached("layout.reserving")
                os.posix_fallocate(fd, 0, RESERVED_SIZE)
                os.ftruncate(fd, RESERVED_SIZE)
        finally:
            os.close(fd)
    except OSError:
        pass


@contextmanager
def spending_reserve(database: str) -> Iterator[None]:
    """Let the database have what is reserved for it, if its disk is full.

    :param database: its directory.
    """
    free = os.statvfs(database)
    if free.f_bavail * free.f_frsize >= RESERVED_SIZE:
        yield
        return
    reserve_space(database, False)
    try:
        yield
    finally:
        reserve_space(database, True)


def make_user_directory(state: str, name: str, uid: int) -> str | None:
    """Make the profile directory of the user NAME, owned by UID, if there is none (§14).

    :return: why that was not possible; `None` if it is there now.
    """
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        return f"'{name}' is not a user name"
    directory = f"{state}/profiles/per-user/{name}"
    try:
        if os.path.lexists(directory):
            return None
        _make(os.path.dirname(directory))
        os.mkdir(directory, 0o755)
        try:
            os.chmod(directory, 0o755)
            os.chown(directory, uid, -1)
        except OSError:
            os.rmdir(directory)
            raise
    except OSError as error:
        return f"cannot make the profile directory '{directory}': {error.strerror}"
    return None
