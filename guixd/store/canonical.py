"""Metadata of store items, and of what leaves a build (spec: store §6, sandbox §3, build §8).

All of this may only run when no process of the build is left.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable
from errno import ENODATA, ENOTSUP
from functools import partial
from typing import TypeVar

from guixd.errors import BuildError, StoreError
from guixd.store.descent import Check, Descent, go_on, handle_path, identity, walk

STORE_TIME = 1_000_000_000
"""Modification time of everything in the store, nanoseconds since the epoch."""
InodesSeen = set[tuple[int, int]]
"""Device and inode of the files with several links that one build made."""

_Result = TypeVar("_Result")
_Links = Counter[tuple[int, int]]
_UNSAFE = stat.S_ISUID | stat.S_ISGID | stat.S_IWOTH
_STORED = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
_PIPES = (stat.S_IFSOCK, stat.S_IFIFO)


def canonical_mode(mode: int) -> int:
    """Return the permission bits in the store of a file or directory with MODE."""
    permissions = stat.S_IMODE(mode)
    if permissions in (0o444, 0o555):
        return permissions
    return 0o555 if mode & stat.S_IXUSR else 0o444


def canonicalise(
    dir_fd: int | None,
    name: str,
    owner: int | None,
    seen: InodesSeen,
    check: Check = go_on,
) -> None:
    """Give NAME in the directory DIR_FD, and all below it, the metadata of the store.

    Mode 0444 or 0555, modification time 1, the daemon's user and group, and no
    extended attributes, access control lists or capabilities.

    :param owner: uid that everything must belong to, the build user; None for any.
    :param seen: shared by the outputs of one build; grows.
    :param check: called for each node.
    :raises BuildError: something belongs to neither OWNER nor, as a further link, to this build.
    :raises StoreError: an unsupported type of file, or the file system refuses.
    """
    _guarded(
        name,
        lambda: walk(
            dir_fd, name, partial(_canonicalise_node, owner, seen), _canonicalise_directory, check
        ),
    )
    status = _guarded(name, lambda: os.stat(name, dir_fd=dir_fd, follow_symlinks=False))
    if status.st_uid != os.geteuid():
        raise StoreError(f"'{name}' does not belong to the daemon in the end")


def _canonicalise_node(
    owner: int | None, seen: InodesSeen, down: Descent, name: str, status: os.stat_result
) -> None:
    mode = status.st_mode
    is_directory = stat.S_ISDIR(mode)
    if stat.S_IFMT(mode) not in _STORED:
        raise _unsupported(down.path(name), mode)
    if owner is not None and status.st_uid != owner:
        if not is_directory and identity(status) in seen:
            return
        raise BuildError(f"invalid ownership on '{down.path(name)}'")
    if not is_directory and status.st_nlink > 1:
        seen.add(identity(status))
    if stat.S_ISLNK(mode):
        _canonicalise_link(down, name, status)
        return
    # O_PATH: a file or directory without read permission can be reached, too.
    with _Handle(name, down.fd, status) as path:
        _take(path, status)
        # The final mode of a directory may keep us out of it.
        os.chmod(path, 0o700 if is_directory else canonical_mode(mode))
        if not is_directory and status.st_mtime_ns != STORE_TIME:
            os.utime(path, ns=(status.st_atime_ns, STORE_TIME))


def _canonicalise_link(down: Descent, name: str, status: os.stat_result) -> None:
    uid, gid = os.geteuid(), os.getegid()
    if (status.st_uid, status.st_gid) != (uid, gid):
        os.chown(name, uid, gid, dir_fd=down.fd, follow_symlinks=False)
    if status.st_mtime_ns != STORE_TIME:
        times = (status.st_atime_ns, STORE_TIME)
        os.utime(name, ns=times, dir_fd=down.fd, follow_symlinks=False)


def _canonicalise_directory(fd: int, status: os.stat_result) -> None:
    os.fchmod(fd, canonical_mode(status.st_mode))
    os.utime(fd, ns=(status.st_atime_ns, STORE_TIME))


def _take(path: str, status: os.stat_result) -> None:
    """Make the inode behind PATH the daemon's, without extended attributes."""
    uid, gid = os.geteuid(), os.getegid()
    if (status.st_uid, status.st_gid) != (uid, gid):
        os.chown(path, uid, gid)
    _drop_attributes(path, status)


def _drop_attributes(path: str, status: os.stat_result) -> bool:
    """Drop the extended attributes of the inode behind PATH, access control lists among them.

    :return: whether there were some; then its permissions may be others than before.
    """
    try:
        attributes = os.listxattr(path)
    except OSError as error:
        if error.errno != ENOTSUP:
            raise
        return False
    dropped = [attribute for attribute in attributes if not _is_of_system(attribute)]
    if dropped and not status.st_mode & stat.S_IWUSR:
        os.chmod(path, stat.S_IMODE(status.st_mode) | stat.S_IWUSR)  # else only root may
    for attribute in dropped:
        try:
            os.removexattr(path, attribute)
        except OSError as error:
            if error.errno != ENODATA:  # the one removal may take another along
                raise
    return bool(dropped)


def _is_of_system(attribute: str) -> bool:
    """Whether ATTRIBUTE is no builder's: a label of a security module, or always there."""
    label = attribute.startswith("security.") and attribute != "security.capability"
    return label or attribute == "system.nfs4_acl"


class _Handle:
    """An O_PATH descriptor of the node NAME, as a file name that leads to its inode.

    :param links: how many links of what has several the tree has, if it may have no others.
    """

    def __init__(
        self, name: str, dir_fd: int | None, status: os.stat_result, links: _Links | None = None
    ) -> None:
        self._fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        now = os.fstat(self._fd)
        more = links is not None and now.st_nlink > max(1, links[identity(now)])
        if identity(now) != identity(status) or (more and not stat.S_ISDIR(now.st_mode)):
            os.close(self._fd)
            raise StoreError(f"file '{name}' was exchanged while it was in use")

    def __enter__(self) -> str:
        return handle_path(self._fd)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def check_output(dir_fd: int | None, name: str, owner: int | None) -> os.stat_result:
    """Test the top node of a build's output before anything else is done with it.

    :param owner: the build user, who must own it; None for any.
    :return: its status.
    :raises BuildError: others may write to it, or it is not OWNER's.
    :raises FileNotFoundError: there is none.
    """
    status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    writable = not stat.S_ISLNK(status.st_mode) and status.st_mode & 0o022
    if writable or (owner is not None and status.st_uid != owner):
        mode = stat.S_IMODE(status.st_mode)
        raise BuildError(
            f"suspicious ownership or permission on '{name}' (mode {mode:o}, user {status.st_uid});"
            " output rejected: it must be the build user's, with write permission for no others"
        )
    return status


def _unsupported(path: str, mode: int) -> StoreError:
    kinds = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(mode), "device")
    return StoreError(
        f"file '{path}' has an unsupported type: it is a {kind}, but the store has only regular"
        " files, directories and symbolic links"
    )


def strip(dir_fd: int | None, name: str, *, pipes: bool = True, check: Check = go_on) -> None:
    """Clear setuid, setgid and write permission for others on NAME and all below it.

    Extended attributes go, too, since access control lists permit as well.

    :param pipes: whether sockets and FIFOs may be in it.
    :param check: called for each node.
    :raises StoreError: a device or other special file, or a file with links
        from elsewhere; nothing was changed then.
    """
    links = _guarded(name, lambda: _check_links(dir_fd, name, pipes, check))

    def strip_node(down: Descent, name: str, status: os.stat_result) -> None:
        mode = status.st_mode
        if not stat.S_ISLNK(mode):
            with _Handle(name, down.fd, status, links) as path:
                if _drop_attributes(path, status) or mode & _UNSAFE:
                    os.chmod(path, stat.S_IMODE(mode) & ~_UNSAFE)

    _guarded(name, lambda: walk(dir_fd, name, strip_node, check=check))


def chown_tree(dir_fd: int | None, name: str, uid: int, gid: int) -> None:
    """Give NAME and all below it to UID and GID (-1: unchanged), links themselves.

    :raises StoreError: as for `strip`, or it is not permitted.
    """
    links = _guarded(name, lambda: _check_links(dir_fd, name))

    def give(down: Descent, name: str, status: os.stat_result) -> None:
        if not stat.S_ISDIR(status.st_mode):
            with _Handle(name, down.fd, status, links) as path:
                os.chown(path, uid, gid)

    def give_directory(fd: int, _status: os.stat_result) -> None:
        os.chown(fd, uid, gid)

    _guarded(name, lambda: walk(dir_fd, name, give, give_directory))


def _check_links(dir_fd: int | None, name: str, pipes: bool = True, check: Check = go_on) -> _Links:
    """Refuse what must not change hands: devices, and files with links outside the tree.

    :param pipes: whether sockets and FIFOs may.
    :return: how many links each file has that has several.
    """
    links: _Links = Counter()
    wanted: dict[tuple[int, int], tuple[int, str]] = {}

    def visit(down: Descent, name: str, status: os.stat_result) -> None:
        kind = stat.S_IFMT(status.st_mode)
        if kind not in _STORED and not (pipes and kind in _PIPES):
            raise _unsupported(down.path(name), kind)
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            links[identity(status)] += 1
            wanted[identity(status)] = (status.st_nlink, down.path(name))

    walk(dir_fd, name, visit, check=check)
    for key, (count, path) in wanted.items():
        if links[key] < count:
            raise StoreError(f"file '{path}' has links from outside of its tree")
    return links


def _guarded(name: str, step: Callable[[], _Result]) -> _Result:
    """Return what STEP returns; its OSError becomes a StoreError."""
    try:
        return step()
    except OSError as error:
        raise StoreError(f"cannot treat '{name}': {error.strerror or error}") from error
