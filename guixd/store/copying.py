"""Copies to which nobody holds a descriptor (spec: sandbox §10 I-FRESH)."""

from __future__ import annotations

import os
import stat
from errno import EINVAL, ENOSYS, ENOTSUP, EXDEV

from guixd.errors import StoreError
from guixd.store.descent import DIRECTORY_FLAGS, Check, Descent, go_on, identity, walk

MOST_LINKED = 4096
"""How many files with several names are kept in mind."""
_BLOCK = 1 << 20
_SOURCE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TARGET_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_fresh(
    source_fd: int | None,
    source: str,
    target_fd: int | None,
    target: str,
    check: Check = go_on,
) -> None:
    """Copy the tree SOURCE of one directory to the new name TARGET of another.

    Every file of the copy is a new inode, with the names that the source has for it, but
    for those beyond `MOST_LINKED`.  Permissions (without setuid, setgid and sticky) and,
    if we may, owners are those of the source, for the checks to come.  TARGET's directory
    must be the daemon's alone.

    :param check: called after each block.
    :raises StoreError: something other than files, directories and symbolic
        links, TARGET exists, or the file system refuses.
    """
    first_names: dict[tuple[int, int], str] = {}
    with Descent(target_fd) as copy:

        def link(new: str, status: os.stat_result) -> bool:
            """Make NEW another name of the copy of the same file, if there is one."""
            if status.st_nlink == 1:
                return False
            first = first_names.get(identity(status))
            if first is None:
                if len(first_names) < MOST_LINKED:
                    first_names[identity(status)] = copy.path(new)
                return False
            try:
                os.link(first, new, src_dir_fd=target_fd, dst_dir_fd=copy.fd, follow_symlinks=False)
            except OSError:  # the name is too long, or there are too many
                return False
            return True

        def visit(down: Descent, name: str, status: os.stat_result) -> None:
            new = name if down.depth else target
            if stat.S_ISDIR(status.st_mode):
                os.mkdir(new, 0o700, dir_fd=copy.fd)
                copy.push(os.open(new, DIRECTORY_FLAGS, dir_fd=copy.fd), new)
            elif stat.S_ISLNK(status.st_mode):
                os.symlink(os.readlink(name, dir_fd=down.fd), new, dir_fd=copy.fd)
                if os.geteuid() == 0:
                    uid, gid = status.st_uid, status.st_gid
                    os.chown(new, uid, gid, dir_fd=copy.fd, follow_symlinks=False)
            elif stat.S_ISREG(status.st_mode):
                if not link(new, status):
                    _copy_file(down, name, status, copy.fd, new, check)
            else:
                raise StoreError(f"file '{down.path(name)}' has an unsupported type")

        def leave(_fd: int, status: os.stat_result) -> None:
            if copy.fd is not None:
                _copy_metadata(copy.fd, status)
            copy.leave()

        try:
            walk(source_fd, source, visit, leave, check)
        except OSError as error:
            raise StoreError(f"cannot copy '{source}': {error.strerror or error}") from error


def _copy_file(
    down: Descent,
    name: str,
    status: os.stat_result,
    target_fd: int | None,
    new: str,
    check: Check,
) -> None:
    source = os.open(name, _SOURCE_FLAGS, dir_fd=down.fd)
    try:
        if identity(os.fstat(source)) != identity(status):
            raise StoreError(f"file '{down.path(name)}' was exchanged while it was copied")
        target = os.open(new, _TARGET_FLAGS, 0o600, dir_fd=target_fd)
        try:
            _copy_contents(source, target, check)
            _copy_metadata(target, status)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy_contents(source: int, target: int, check: Check) -> None:
    """Copy to the end of the file, within the kernel if that can do it."""
    try:
        while os.copy_file_range(source, target, _BLOCK * 64):
            check()
    except OSError as error:
        if error.errno not in (EXDEV, EINVAL, ENOSYS, ENOTSUP):
            raise
    # Also for file systems where the kernel's copying stops at once without an error.
    while block := os.read(source, _BLOCK):
        check()
        view = memoryview(block)
        while view:
            view = view[os.write(target, view) :]


def _copy_metadata(fd: int, status: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.chown(fd, status.st_uid, status.st_gid)
    os.fchmod(fd, status.st_mode & 0o777)
