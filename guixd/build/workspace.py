"""The directories of one build: its build tree and what it can write (spec: sandbox §3, §4).

Everything here blocks, so it is called in threads.  What a builder could have
touched is reached by descriptors only.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from guixd.build.leftovers import RUNNING, claim
from guixd.build.users import BuildUser
from guixd.errors import StoreError
from guixd.faults import reached
from guixd.formats.path import StorePath
from guixd.store.trees import chown_tree, remove, remove_small, strip

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TOP = "top"
_STORE = "store"
_TMP = "tmp"
_IN_ORDER = 100
"""How many numbers are tried in their order: anybody may have made directories with them."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A build tree that was kept, and what could not be done with it."""

    path: str
    problem: str = ""


@dataclass(slots=True, eq=False)
class Workspace:
    """The directories of a build.

    :ivar outside: name of the build tree, `TMP/guix-build-NAME-N`.
    :ivar build_directory: where the builder works, as the host names it.
    :ivar chroot: a directory that only the daemon can enter; `None` without a container.
    :ivar store: a directory in it, which the builder finds as the store directory.
    :ivar tmp: likewise what it finds as /tmp.
    """

    outside: str
    build_directory: str
    chroot: str | None
    _outside_fd: int
    _build_fd: int
    _store_fd: int
    _kept: bool = False

    @classmethod
    def create(
        cls,
        path: StorePath,
        *,
        temporary: str,
        use_chroot: bool,
        user: BuildUser | None,
        files: Mapping[str, bytes] | None = None,
        plain: bool = False,
    ) -> Workspace:
        """Make the directories for the derivation PATH.

        :param temporary: parent of the build tree, without symbolic links.
        :param user: who runs the builder and gets the build directory; `None`
            for the daemon's user.
        :param files: contents by name to put into the build directory.
        :param plain: whether a builder finds the build tree itself, which then has the
            usual mode and is not found by the next daemon.
        :raises OSError: or `StoreError`; nothing is left then.
        """
        opened: list[int] = []
        mode = 0o700 if plain else RUNNING
        outside = _make_outside(f"{temporary}/guix-build-{path.name}", mode)
        chroot = None
        try:
            opened.append(_open_own(outside, None, mode))
            claim(opened[0])
            if use_chroot:
                build_directory = f"{outside}/{_TOP}"
                os.mkdir(_TOP, 0o700, dir_fd=opened[0])
                opened.append(_open_own(_TOP, opened[0], 0o700))
            else:
                build_directory = outside
                opened.append(os.dup(opened[0]))
            for name, data in (files or {}).items():
                _write(opened[1], name, data)
            if user is not None:
                os.chown(opened[1], user.uid, user.gid)
            if use_chroot:
                chroot = f"{path}.chroot"
                opened.append(_make_chroot(chroot, user))
                reached("workspace.made")
        except BaseException:
            for descriptor in opened:
                os.close(descriptor)
            remove(None, outside)
            if chroot is not None:
                remove(None, chroot)
            raise
        store_fd = opened[2] if use_chroot else -1
        return cls(outside, build_directory, chroot, opened[0], opened[1], store_fd)

    @property
    def store(self) -> str | None:
        return self.chroot and f"{self.chroot}/{_STORE}"

    def open_store(self, store: str) -> int:
        """Return a descriptor of the directory that the builder had as the store.

        To be used when all processes of the build are dead; the caller closes it.

        :param store: the store directory, which a builder without a container has.
        """
        return os.open(store, _DIRECTORY) if self._store_fd < 0 else os.dup(self._store_fd)

    def open_build(self) -> int:
        """Return a descriptor of the build directory, likewise."""
        return os.dup(self._build_fd)

    def remove(self) -> None:
        """Delete all of it but what is kept; what is gone already is no error.

        :raises StoreError: something could not be deleted; the rest is.
        """
        self._close()
        try:
            if not self._kept:
                remove(None, self.outside)
        finally:
            if self.chroot is not None:
                remove(None, self.chroot)

    def remove_small(self) -> bool:
        """Delete what little there is, in a moment.

        :return: whether that was all; if not, `remove` is to follow in a thread.
        :raises StoreError: something could not be deleted.
        """
        gone = remove_small(None, self.outside)
        if gone and self.chroot is not None:
            gone = remove_small(None, self.chroot)
        if gone:
            self._close()
        return gone

    def keep(self, uid: int | None, gid: int | None) -> Kept:
        """Hand the build tree over to a client for inspection, and delete the rest.

        To be used when all processes of the build are dead.  Until modes and
        owner are final nobody else can enter the tree.

        :param uid: the client's; with 0 or `None` the tree stays the daemon's.
        """
        self._kept = True
        try:
            os.chmod(self._outside_fd, 0o700)
            return Kept(self.outside, self._hand_over(uid, gid) if uid else "")
        except (OSError, StoreError) as error:
            return Kept(self.outside, f"build tree '{self.outside}' stays closed: {error}")
        finally:
            self.remove()

    def _hand_over(self, uid: int, gid: int | None) -> str:
        problem = ""
        within = self._outside_fd if self.chroot is not None else None
        tree = _TOP if self.chroot is not None else self.outside
        strip(within, tree)
        try:
            chown_tree(within, tree, uid, gid or -1)
            os.chown(self._build_fd, os.geteuid(), -1)
        except (OSError, StoreError) as error:
            uid, problem = -1, f"cannot change the owner of '{self.outside}': {error}"
        if self.chroot is not None:
            # A name that nobody could have taken before.
            pivot = f"{self.outside}.{secrets.token_hex(8)}"
            os.rename(self.outside, pivot)
            reached("workspace.pivoted")
            os.rename(_TOP, self.outside, src_dir_fd=self._outside_fd)
            os.rmdir(pivot)
        os.chmod(self._build_fd, 0o755)
        if uid >= 0:
            os.chown(self._build_fd, uid, -1)
        return problem

    def _close(self) -> None:
        opened = (self._outside_fd, self._build_fd, self._store_fd)
        self._outside_fd = self._build_fd = self._store_fd = -1
        for descriptor in opened:
            if descriptor >= 0:
                os.close(descriptor)


def _make_outside(prefix: str, mode: int) -> str:
    """Create a PREFIX-N, the first that does not exist if that is soon found, for us only.

    It has its MODE at once, by which the next daemon knows it if all else fails.
    """
    others = (secrets.randbelow(1 << 31) for _ in range(_IN_ORDER))
    for number in chain(range(_IN_ORDER), others):
        outside = f"{prefix}-{number}"
        try:
            os.mkdir(outside, mode)
        except FileExistsError:
            continue
        return outside
    raise StoreError(f"there are too many build trees '{prefix}-N' already")


def _make_chroot(chroot: str, user: BuildUser | None) -> int:
    """Create what is in CHROOT; return a descriptor of what the builder has as the store."""
    try:
        os.mkdir(chroot, 0o750)
    except FileExistsError:
        remove(None, chroot)
        os.mkdir(chroot, 0o750)
    above = _open_own(chroot, None, 0o750)
    try:
        # Nobody else can enter the directory above.
        for name, mode in (_TMP, 0o1777), (_STORE, 0o1775):
            os.mkdir(name, dir_fd=above)
            os.chmod(name, mode, dir_fd=above)
        store = os.open(_STORE, _DIRECTORY, dir_fd=above)
    finally:
        os.close(above)
    if user is not None:
        os.chown(store, -1, user.gid)
    return store


def _open_own(name: str, within: int | None, mode: int) -> int:
    """Open a directory that was just made; it must be this process' own.

    Its group becomes the daemon's, whatever the directory above has set.
    """
    descriptor = os.open(name, _DIRECTORY, dir_fd=within)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise StoreError(f"directory '{name}' was exchanged")
        if status.st_gid != os.getegid():
            os.chown(descriptor, -1, os.getegid())
        if stat.S_IMODE(status.st_mode) != mode:
            os.chmod(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _write(directory: int, name: str, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, 0o644, dir_fd=directory), "wb") as file:
        file.write(data)
