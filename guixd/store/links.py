"""Equal files of the store share one inode, by way of the pool STORE/.links (spec: store §9).

An entry of the pool is one more link of a file, named by the hash of the archive that the
file alone would make.  Any daemon of the store may add entries and replace files at any
time, and a collector removes those that nothing else links to; each step allows for that.
A file is replaced by a rename, so that who reads it never misses it, and its
directory keeps the mode and the time of all items.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from errno import EDQUOT, EMLINK, ENOSPC
from types import TracebackType

from guixd.errors import StoreError
from guixd.faults import reached
from guixd.formats import nar
from guixd.formats.hashes import Hash, to_base32
from guixd.formats.nar import nar_of_file
from guixd.store.canonical import STORE_TIME
from guixd.store.descent import DIRECTORY_FLAGS, Descent, identity, walk

POOL = ".links"
SMALLEST = 8192
"""Bytes of the smallest files that are shared: a link less saves nothing."""
_ATTEMPTS = 32
_MOST_NOTES = 100
BLOCK = 256 * 1024
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_numbers = itertools.count(1)


def start_key(size: int, executable: bool) -> Hash:
    """Return a hash to be updated with the contents of a file; end it with `end_key`."""
    return hashlib.sha256(nar.MAGIC + nar.file_header(size, executable))


def end_key(running: Hash, size: int) -> bytes:
    """Return the key in the pool of the file of SIZE bytes whose contents RUNNING has."""
    running.update(nar.padding(size) + nar.CLOSE)
    return running.digest()


def is_shared(status: os.stat_result) -> bool:
    """Whether a file with STATUS has its place in the pool."""
    return stat.S_ISREG(status.st_mode) and status.st_size >= SMALLEST


class Links:
    """The pool of one store, for one piece of work in one thread.

    :param store: the file name of the store directory.
    :param distrust: whether to look at the contents of what is in the pool before they
        take the place of others, since the store is being repaired.
    :ivar notes: lines for the user, about files that could not be shared; not too many.
    :ivar files: how many files have been replaced.
    :ivar freed: the sum of their sizes in bytes.
    """

    def __init__(self, store: str, *, distrust: bool = False) -> None:
        self.notes: list[str] = []
        self.files = 0
        self.freed = 0
        self._store_name = store
        self._distrust = distrust
        self._store = -1
        self._pool = -1

    def __enter__(self) -> Links:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open; it opens again when it is needed."""
        for fd in self._store, self._pool:
            if fd >= 0:
                os.close(fd)
        self._store = self._pool = -1

    def share(
        self,
        dir_fd: int | None,
        name: str | bytes,
        key: bytes,
        status: os.stat_result,
        *,
        is_kept: bool = False,
    ) -> bool:
        """Let the file NAME be the same as all equal ones of the store, or be their first.

        Nothing happens if it is small or no file at all.  Blocks for a moment.

        :param dir_fd: None if NAME is a file name directly in the store.
        :param key: the sha256 of the file's archive, see `end_key`.
        :param status: of the file as it is now, with the store's mode and owner.
        :param is_kept: whether the caller is in `kept`.
        :return: whether another inode has taken the file's place.
        :raises StoreError: the file system refuses.
        """
        if not is_shared(status):
            return False
        if status.st_mode & stat.S_IWUSR:
            self._tell("skipping the suspicious writable file", name)
            return False
        before = self.files
        try:
            self._share(dir_fd, name, to_base32(key), key, status, is_kept)
        except OSError as error:
            text = f"cannot share '{os.fsdecode(name)}': {error.strerror}"
            raise StoreError(text) from error
        return self.files > before

    def _share(
        self,
        dir_fd: int | None,
        name: str | bytes,
        entry: str,
        key: bytes,
        status: os.stat_result,
        is_kept: bool,
    ) -> None:
        if self._pool < 0:
            self._open()
        for _ in range(_ATTEMPTS):
            try:
                present = os.stat(entry, dir_fd=self._pool, follow_symlinks=False)
            except FileNotFoundError:
                if self._add(dir_fd, name, entry):
                    return
                continue
            if identity(present) == identity(status):
                return
            if not self._is_good(present, status, entry, key):
                self._tell("replacing the corrupted link", f"{self._store_name}/{POOL}/{entry}")
                _unlink(entry, self._pool)
            elif self._replace(dir_fd, name, entry, status, is_kept):
                return
        self._tell("others change the pool of links all the time, so not shared:", name)

    def _open(self) -> None:
        # The administrator may have let the name of the store lead through links.
        self._store = os.open(self._store_name, DIRECTORY_FLAGS & ~os.O_NOFOLLOW)
        try:
            self._pool = os.open(POOL, DIRECTORY_FLAGS, dir_fd=self._store)
        except FileNotFoundError:
            try:
                os.mkdir(POOL, 0o755, dir_fd=self._store)
            except FileExistsError:
                pass
            self._pool = os.open(POOL, DIRECTORY_FLAGS, dir_fd=self._store)

    def _add(self, dir_fd: int | None, name: str | bytes, entry: str) -> bool:
        """Make NAME the ENTRY of the pool; whether this is all that can be done."""
        try:
            os.link(name, entry, src_dir_fd=dir_fd, dst_dir_fd=self._pool, follow_symlinks=False)
        except FileExistsError:
            return False
        except FileNotFoundError:
            os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            # The administrator has removed the pool; it is no loss.
            self.close()
            self._open()
            return False
        except OSError as error:
            if error.errno not in (ENOSPC, EDQUOT, EMLINK):
                raise
            self._tell(f"no new link ({error.strerror}) for", name)
            return True
        reached("links.added")
        return True

    def _is_good(
        self, present: os.stat_result, status: os.stat_result, entry: str, key: bytes
    ) -> bool:
        """Whether the ENTRY that is PRESENT can stand for a file with STATUS."""
        return (
            present.st_mode == status.st_mode
            and present.st_size == status.st_size
            and present.st_uid == status.st_uid
            and not (self._distrust and self.key(self._pool, entry) != key)
        )

    def _replace(
        self,
        dir_fd: int | None,
        name: str | bytes,
        entry: str,
        status: os.stat_result,
        is_kept: bool,
    ) -> bool:
        """Put a link of ENTRY in the place of NAME; whether this is all that can be done."""
        store = self._store
        temporary = f".tmp-link-{os.getpid()}-{next(_numbers)}"
        try:
            os.link(
                entry, temporary, src_dir_fd=self._pool, dst_dir_fd=store, follow_symlinks=False
            )
        except (FileNotFoundError, FileExistsError):  # a collector; a dead process' leftover
            return False
        except OSError as error:
            if error.errno not in (EMLINK, ENOSPC, EDQUOT):
                raise
            self._tell(f"no new link ({error.strerror}) for", name)
            return True
        reached("links.temporary")
        try:
            with nullcontext() if is_kept else kept(dir_fd):
                os.rename(temporary, name, src_dir_fd=store, dst_dir_fd=dir_fd)
        except FileNotFoundError:
            # A collector takes it for a leftover.  If NAME is gone, adding finds out.
            return False
        except OSError as error:
            if error.errno not in (EMLINK, ENOSPC, EDQUOT):
                raise
            self._tell(f"no new link ({error.strerror}) for", name)
            return True
        finally:
            # Renaming does nothing if another process has done the same meanwhile.
            _unlink(temporary, store)
        reached("links.replaced")
        self.files += 1
        self.freed += status.st_size
        return True

    def forget(self, name: str) -> None:
        """Take out of the pool what only NAME, a tree that is about to go, has put there.

        :raises StoreError: the file system refuses.
        """
        try:
            walk(None, name, self._forget)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError(f"cannot forget '{name}': {error.strerror}") from error

    def _forget(self, down: Descent, name: str, status: os.stat_result) -> None:
        if self._pool < 0 or not is_shared(status) or status.st_nlink != 2:
            return
        key = self.key(down.fd, name)
        if key is None:
            return
        entry = to_base32(key)
        try:
            present = os.stat(entry, dir_fd=self._pool, follow_symlinks=False)
        except FileNotFoundError:
            return
        if identity(present) == identity(status):
            _unlink(entry, self._pool)

    def key(self, dir_fd: int | None, name: str | bytes) -> bytes | None:
        """Return the key of the file NAME; None if it is no file, or has changed meanwhile.

        :raises OSError: it cannot be read.
        """
        fd = os.open(name, FILE_FLAGS, dir_fd=dir_fd)
        try:
            status = os.fstat(fd)
            return key_of(fd, status) if stat.S_ISREG(status.st_mode) else None
        finally:
            os.close(fd)

    def _tell(self, what: str, name: str | bytes) -> None:
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(f"{what} '{os.fsdecode(name)}'")


def key_of_small(fd: int, status: os.stat_result) -> bytes | None:
    """Return what `key_of` does for a file of at most `BLOCK` bytes, faster."""
    size = status.st_size
    contents = os.read(fd, size)
    if len(contents) != size:
        return None
    return hashlib.sha256(nar_of_file(contents, bool(status.st_mode & stat.S_IXUSR))).digest()


def key_of(
    fd: int,
    status: os.stat_result,
    buffer: memoryview | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> bytes | None:
    """Return the key of the file that FD is open on, at its beginning.

    :param buffer: what it may be read into.
    :param stopped: is asked after each block.
    :return: None if it shrank, or it was STOPPED.
    """
    size = status.st_size
    running = start_key(size, bool(status.st_mode & stat.S_IXUSR))
    if buffer is None:
        buffer = memoryview(bytearray(min(size, BLOCK)))
    done = 0
    while done < size:
        if stopped():
            return None
        got = os.readv(fd, [buffer[: size - done]])
        if not got:
            return None
        running.update(buffer[:got])
        done += got
    return end_key(running, size)


@contextmanager
def kept(dir_fd: int | None) -> Iterator[None]:
    """Let names in a directory be changed that has the form of the store, and shall keep it.

    Whoever replaces many files of a directory does it once, around all of them.
    """
    # The store itself, and what is still being written, is writable.
    status = None if dir_fd is None else os.fstat(dir_fd)
    if dir_fd is None or status is None or status.st_mode & stat.S_IWUSR:
        yield
        return
    closed = os.geteuid() != 0
    if closed:
        os.fchmod(dir_fd, stat.S_IMODE(status.st_mode) | stat.S_IWUSR)
    try:
        yield
    finally:
        if closed:
            os.fchmod(dir_fd, stat.S_IMODE(status.st_mode))
        os.utime(dir_fd, ns=(status.st_atime_ns, STORE_TIME))


def _unlink(name: str, dir_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        pass
