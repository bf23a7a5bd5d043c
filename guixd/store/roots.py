"""Roots of the garbage collector: temporary ones of sessions, permanent ones (spec: gc §3, §4)."""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR

from guixd.errors import Busy, NotInStore, StoreError
from guixd.faults import reached
from guixd.formats.hashes import to_base32
from guixd.formats.path import StoreDirectory, StorePath
from guixd.store.locks import FileLock, lock_descriptor

__all__ = ["Busy", "Collecting", "TempRoots", "add_indirect_root", "canonical", "find_roots"]

_BUSY = "a garbage collection is running"
_NOWHERE = (ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG)
"""A name leads nowhere.  Users choose names, so none may end a collection."""


class Collecting:
    """The collector's lock, and what the sessions of this process know of its holder.

    If that is this process itself they need not wait, as it asks them before it
    deletes anything.

    :param gc_lock: its name, `STATE/gc.lock`.
    :ivar locked: whether this process has it exclusively.
    :ivar touched: all that was protected since a collection began; `None` when none runs.
    """

    def __init__(self, gc_lock: str) -> None:
        self._lock = FileLock(gc_lock)
        self.locked = False
        self.touched: set[StorePath] | None = None

    def begin(self) -> None:
        """Take the lock exclusively.

        :raises Busy: another process, or another request, has it.
        """
        if self.locked or not self._lock.acquire(exclusive=True):
            raise Busy("waiting for the lock of the garbage collector")
        self.locked = True

    def end(self) -> None:
        """Give the lock back."""
        self.touched = None
        self.locked = False
        self._lock.close()

    def pass_by(self) -> None:
        """Return if no other process collects.

        :raises Busy: one does.
        """
        if self.locked:
            return
        try:
            if not self._lock.acquire(exclusive=False):
                raise Busy(_BUSY)
        finally:
            self._lock.close()


class TempRoots:
    """What one session protects from collectors until it ends.

    The file that tells other daemons is made when the first root is added.

    :param file: its name, such as `STATE/temproots/PID-N`.
    :param gc_lock: the name of the collector's lock, `STATE/gc.lock`.
    :param closed: is called with this object when it is closed.
    :param collecting: what this process knows of that lock.
    :ivar paths: all that was added.
    """

    def __init__(
        self,
        file: str,
        gc_lock: str,
        closed: Callable[[TempRoots], object] = lambda _: None,
        collecting: Collecting | None = None,
    ) -> None:
        self.paths: set[StorePath] = set()
        self._collecting = collecting or Collecting(gc_lock)
        self._on_close = closed
        self._file = file
        self._gc_lock = gc_lock
        self._fd: int | None = None
        self._closed = False

    def add(self, path: StorePath) -> None:
        """Protect PATH, valid or not, without waiting.

        :raises Busy: a collector is reading; try again later.
        :raises StoreError: the file cannot be written.
        """
        if path in self.paths:
            return
        if self._closed:
            raise StoreError("the session has ended")
        try:
            fd = self._open() if self._fd is None else self._fd
            if not lock_descriptor(fd, exclusive=True):
                raise Busy(_BUSY)
            try:
                entry = path.encode("utf-8", "surrogateescape") + b"\0"
                done = os.write(fd, entry)
                reached("roots.protected")
                if done != len(entry):
                    # Half a name would spoil the next one.
                    os.ftruncate(fd, os.fstat(fd).st_size - done)
                    raise StoreError(f"cannot write '{self._file}': the disk is full")
            finally:
                lock_descriptor(fd, exclusive=False)
        except OSError as error:
            raise StoreError(f"cannot write '{self._file}': {error.strerror}") from error
        self.paths.add(path)
        if self._collecting.touched is not None:
            self._collecting.touched.add(path)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        while True:
            gc_lock = FileLock(self._gc_lock)
            try:
                # Our own collector has that lock, but knows what we protect without the file.
                if not self._collecting.locked and not gc_lock.acquire(exclusive=False):
                    raise Busy(_BUSY)
                try:
                    os.unlink(self._file)  # of a dead process with our number
                except FileNotFoundError:
                    pass
                fd = os.open(self._file, flags, 0o600)
                reached("roots.opened")
            finally:
                gc_lock.close()
            # A collector that comes between takes the file for that of a dead process.
            try:
                if lock_descriptor(fd, exclusive=False) and not os.fstat(fd).st_size:
                    self._fd = fd
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def close(self) -> None:
        """Give all roots up."""
        self._closed = True
        self.paths.clear()
        if self._fd is not None:
            try:
                os.unlink(self._file)
            except FileNotFoundError:
                pass
            os.close(self._fd)
            self._fd = None
        self._on_close(self)


def canonical(path: str) -> str:
    """Make PATH absolute, from `/` on, and free of `.`, `..` and empty parts, as text."""
    return posixpath.normpath("/" + path.lstrip("/"))


def add_indirect_root(state: str, path: str) -> None:
    """Make a root of what the symbolic link PATH points to, as long as it does.

    :param state: the state directory.
    :raises StoreError: the link to it cannot be made.
    """
    path = canonical(path)
    directory = state + "/gcroots/auto"
    digest = hashlib.sha1(os.fsencode(path), usedforsecurity=False).digest()
    link = f"{directory}/{to_base32(digest)}"
    temporary = f"{link}.{os.getpid()}-{threading.get_ident()}"
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        try:
            if os.readlink(link) == path:
                return
        except OSError:
            pass
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        os.symlink(path, temporary)
        reached("roots.linked")
        os.replace(temporary, link)
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot add the root '{path}': {error}") from error


def find_roots(
    state: str,
    store: StoreDirectory,
    is_valid: Callable[[StorePath], bool],
    report: Callable[[str], None],
    *,
    strict: bool = False,
) -> dict[str, StorePath]:
    """Return the permanent roots: from the names of links or files to items, sorted.

    Links below `gcroots/auto` that lead nowhere are removed.  For a thread.

    :param report: gets lines for the user.
    :param strict: whether to fail where permission is missing, because a root may be there.
    :raises StoreError: a directory cannot be read, for other reasons than permission.
    """
    finder = _Finder(state, store, is_valid, report, strict)
    for name in "gcroots", "manifests", "profiles":
        finder.walk(f"{state}/{name}")
    return dict(sorted(finder.roots.items(), key=lambda pair: os.fsencode(pair[0])))


class _Finder:
    def __init__(
        self,
        state: str,
        store: StoreDirectory,
        is_valid: Callable[[StorePath], bool],
        report: Callable[[str], None],
        strict: bool,
    ) -> None:
        self.roots: dict[str, StorePath] = {}
        self._strict = strict
        self._auto = state + "/gcroots/auto/"
        self._store = store
        self._is_valid = is_valid
        self._report = report

    def walk(self, top: str) -> None:
        if not os.path.lexists(top):
            return
        pending = [top]
        while pending:
            path = pending.pop()
            with self._tolerating(path):
                mode = os.lstat(path).st_mode
                if stat.S_ISDIR(mode):
                    pending += [f"{path}/{name}" for name in os.listdir(path)]
                elif stat.S_ISLNK(mode):
                    self._link(path)
                elif stat.S_ISREG(mode):
                    item = self._store.child(os.path.basename(path))
                    if self._is_valid(item):
                        self.roots[path] = item

    @contextmanager
    def _tolerating(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (EACCES, *_NOWHERE):
                raise StoreError(f"cannot read '{path}': {error.strerror}") from error
            if self._strict and error.errno == EACCES:
                raise StoreError(
                    f"cannot read '{error.filename or path}', so what the root '{path}' protects is"
                    " not known and nothing is deleted: let the daemon read it, or remove the root"
                ) from error
            self._report(f"cannot read potential root '{path}'")

    def _link(self, path: str) -> None:
        target = os.readlink(path)
        if self._in_store(target):
            self._add(path, target)
            return
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        try:
            mode = os.lstat(target).st_mode
        except OSError as error:
            if error.errno not in _NOWHERE:
                raise
            if path.startswith(self._auto):
                self._report(f"removing stale link from '{path}' to '{target}'")
                os.unlink(path)
            return
        # One step more, and no other: the user's link, to which the first one leads.
        if stat.S_ISLNK(mode):
            second = os.readlink(target)
            if self._in_store(second):
                self._add(target, second)

    def _in_store(self, target: str) -> bool:
        return target.startswith(self._store.path + "/") and len(target) > len(self._store.path) + 1

    def _add(self, link: str, target: str) -> None:
        try:
            item = self._store.containing(target)
        except NotInStore:
            return
        if self._is_valid(item):
            self.roots[link] = item
        else:
            self._report(f"skipping invalid root from '{link}' to '{item}'")
