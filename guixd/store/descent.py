"""Walking hostile trees: by directory descriptors, few of them open, no recursion.

A tree that a builder made may hold any name, link or depth.  Nothing in it is
ever reached by a composed name, and no symbolic link is followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from types import TracebackType

from guixd.errors import StoreError

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_OPEN = 32
Check = Callable[[], object]
"""Called after each step of what takes long; what it raises ends that."""


def go_on() -> None:
    """Let everything come to its end: the `Check` of who has none."""


class Descent:
    """The chain of directories from a base down to where a walk is.

    Only the innermost directories stay open; one further up is opened again as
    the parent of its child, and must then be the same directory as before.

    :ivar names: the names entered, for messages.
    """

    def __init__(self, base: int | None) -> None:
        """Begin at the directory BASE, which stays the caller's; None is any file name's."""
        self.fd = base
        self.names: list[str] = []
        self._base = base
        self._fds: list[int] = []
        self._closed: list[tuple[int, int]] = []  # ids of the outer directories

    def __enter__(self) -> Descent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def depth(self) -> int:
        """How many directories were entered."""
        return len(self._fds)

    def enter(self, name: str | bytes) -> int:
        """Make the directory NAME the current one and return its descriptor.

        :raises OSError: it cannot be opened; ENOTDIR or ELOOP if it is no directory.
        """
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=self.fd)
        self.push(fd, name)
        return fd

    def push(self, fd: int, name: str | bytes) -> None:
        """Make the open directory FD, which becomes ours, the current one."""
        fds = self._fds
        fds.append(fd)
        self.names.append(os.fsdecode(name))
        self.fd = fd
        if len(fds) - len(self._closed) > _MOST_OPEN:
            outer = len(self._closed)
            self._closed.append(identity(os.fstat(fds[outer])))
            os.close(fds[outer])

    def leave(self) -> None:
        """Make the parent the current directory.

        :raises StoreError: a directory was moved meanwhile.
        """
        fds = self._fds
        if len(self._closed) == len(fds) - 1 and self._closed:
            parent = os.open("..", DIRECTORY_FLAGS, dir_fd=fds[-1])
            if identity(os.fstat(parent)) != self._closed[-1]:
                os.close(parent)
                raise StoreError(f"directory '{self.path('')}' was moved while it was in use")
            self._closed.pop()
            fds[-2] = parent
        os.close(fds.pop())
        self.names.pop()
        self.fd = fds[-1] if fds else self._base

    def path(self, name: str | bytes) -> str:
        """Return how to call NAME in the current directory in a message."""
        text = "/".join([*self.names, os.fsdecode(name)])
        return text if len(text) < 4096 else "…" + text[-4000:]

    def place(self, error: OSError, name: str) -> str:
        """Return how to call what ERROR is about, which began at NAME, in a message."""
        if isinstance(error.filename, str):
            return self.path(error.filename)
        return self.path("").rstrip("/") or name  # of a descriptor, the current directory's

    def close(self) -> None:
        """Close all that is open."""
        for fd in self._fds[len(self._closed) :]:
            os.close(fd)
        self._fds.clear()
        self._closed.clear()
        self.fd = self._base


def identity(status: os.stat_result) -> tuple[int, int]:
    """Return the device and inode of STATUS."""
    return status.st_dev, status.st_ino


def handle_path(fd: int) -> str:
    """Return a file name for the inode that FD, possibly an O_PATH one, is open on."""
    return f"/proc/self/fd/{fd}"


def open_directory(name: str | bytes, dir_fd: int | None) -> int:
    """Open a directory of ours that its mode may not allow to read; it is made so.

    :raises OSError: no such directory, or not ours.
    """
    try:
        return os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)
    except PermissionError:
        handle = os.open(
            name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd
        )
        try:
            os.chmod(handle_path(handle), 0o700)
            return os.open(handle_path(handle), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.close(handle)


Visit = Callable[[Descent, str, os.stat_result], None]
Leave = Callable[[int, os.stat_result], None]


def walk(
    dir_fd: int | None,
    name: str,
    visit: Visit,
    leave: Leave | None = None,
    check: Check = go_on,
) -> None:
    """Visit the node NAME and all below it, parents first.

    VISIT gets the current directory, a name in it and the status of the node
    itself; LEAVE gets the descriptor of each directory after its last entry and
    the status from before its visit.

    :param check: called for each node.
    :raises StoreError: the tree changed meanwhile.
    :raises OSError: from any call, or from VISIT and LEAVE.
    """
    with Descent(dir_fd) as down:
        pending: list[tuple[list[str], os.stat_result | None]] = [([name], None)]
        while pending:
            names, own = pending[-1]
            if not names:
                pending.pop()
                if own is not None:
                    if leave is not None and down.fd is not None:
                        leave(down.fd, own)
                    down.leave()
                continue
            check()
            entry = names.pop()
            status = os.stat(entry, dir_fd=down.fd, follow_symlinks=False)
            visit(down, entry, status)
            if stat.S_ISDIR(status.st_mode):
                fd = open_directory(entry, down.fd)
                down.push(fd, entry)
                if identity(os.fstat(fd)) != identity(status):
                    raise StoreError(f"directory '{down.path('')}' was exchanged while in use")
                pending.append((os.listdir(fd), status))
