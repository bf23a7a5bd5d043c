"""One collection of garbage, in steps between which others use the store (spec: gc §2).

What is alive is computed from one state of the database.  Sessions of this process go on
meanwhile.  They protect a path before they look whether it is valid, and tell
`Collecting` about it; each step of the sweep, which is one short transaction and some
renames in the reactor's thread, passes over what was protected by then.  What is new
keeps what it refers to, as nothing is made invalid to which a valid item refers.  So
whoever finds an item valid keeps it.  Sessions of other daemons wait for the lock.
"""

from __future__ import annotations

import os
import random
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from errno import ENOSPC

from guixd.errors import StoreError
from guixd.faults import reached
from guixd.formats.path import StorePath
from guixd.formats.sizes import size_text
from guixd.store import roots
from guixd.store.busy import busy_names
from guixd.store.descent import DIRECTORY_FLAGS, Check, go_on
from guixd.store.links import POOL
from guixd.store.liveness import DeadItem, Liveness, Marked
from guixd.store.local import LocalStore
from guixd.store.moves import move
from guixd.store.otherroots import OtherRoots
from guixd.store.removal import remove
from guixd.store.roots import TempRoots

TRASH = "trash"
NO_LIMIT = 2**64 - 1
_KEPT = frozenset({TRASH, POOL})
_COMPANIONS = (".lock", ".chroot")
"""Endings of names that lie beside an item that is being made."""
_SMALL = 1 << 16
"""Bytes up to which a file is removed at once, as that takes no longer than moving it."""
_ITEMS, _NAMES = 40, 32
"""How many items, or leftovers, are made away with before the time is looked at."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a collection keeps beyond what roots refer to, and how it counts."""

    keep_outputs: bool = False
    keep_derivations: bool = True
    max_freed: int = NO_LIMIT
    """Bytes after which it ends."""
    most_links: int = 2
    """Link count up to which the removal of a file frees its size."""


class Collection:
    """A collection, from `Collecting.begin` of the store to `close`.

    :param requester: what the client that asks has protected itself; that does not count.
    :param report: gets lines for the user; called in threads, too.
    :param check: called in threads after each step; it raises when the client has left.
    :ivar found: the items, and names of leftovers, that were found dead or have been deleted.
    :ivar freed: bytes; what waits in the trash counts when it is gone.
    """

    def __init__(
        self,
        store: LocalStore,
        requester: TempRoots | None,
        rules: Rules,
        report: Callable[[str], None],
        check: Check = go_on,
    ) -> None:
        self._store = store
        self._rules = rules
        self._report = report
        self._check = check
        self._others = OtherRoots()
        self._protected = store.protected(requester)
        self._touched = store.collecting.touched = set()
        self._marked = Marked(frozenset(), {}, {})
        self._rows: dict[StorePath, int] = {}
        self._leftovers: list[str] = []
        self._due: Iterator[DeadItem] = iter(())
        self._due_names: deque[str] = deque()
        self._chosen: list[StorePath] = []
        self._alive_path: StorePath | None = None
        self._moved: list[str] = []
        self._moves = 0
        self._fd = -1
        self._trash = -1
        self.found: set[StorePath] = set()
        self.freed = 0
        self._expected = 0  # bytes that the removal of what was moved will free
        self._full = False

    # --- marking ------------------------------------------------------------------

    def mark(self, *, strict: bool) -> None:
        """Find roots and what they keep alive, and what else lies in the store; for a thread.

        :param strict: whether to fail where roots might be that cannot be read.
        """
        store, state = self._store, self._store.directories.state
        self._others.read(
            f"{state}/temproots", store.temp_root_prefix, store.directory, self._report
        )
        liveness = Liveness(store.directories.database, store.directory)
        try:
            found = roots.find_roots(
                state, store.directory, liveness.is_valid, self._report, strict=strict
            )
            busy = {store.directory.child(name) for name in busy_names(store.directory.path)}
            self._protected |= self._others.paths
            self._protected |= set(found.values()) | busy
            self._marked = liveness.mark(
                self._protected,
                keep_outputs=self._rules.keep_outputs,
                keep_derivations=self._rules.keep_derivations,
            )
        finally:
            liveness.close()
        self._rows = {item.path: row for row, item in self._marked.dead.items()}
        valid = {path.base for path in self._marked.alive.union(self._rows)}
        try:
            names = os.listdir(store.directory.path)
        except OSError as error:
            raise StoreError(f"cannot read the store: {error.strerror}") from error
        self._leftovers = [name for name in names if name not in valid and not self._is_kept(name)]

    def alive(self) -> tuple[StorePath, ...]:
        """Return the valid items that are needed, sorted; for a thread."""
        return tuple(sorted(self._marked.alive))

    def dead(self) -> tuple[StorePath, ...]:
        """Return all that nothing needs, leftovers of the store included, sorted; for a thread."""
        child = self._store.directory.child
        names = {child(name) for name in self._leftovers}
        return tuple(sorted(names.union(self._rows)))

    def _is_kept(self, name: str) -> bool:
        """Whether the invalid NAME belongs to something that is being made, or to the store."""
        if name in _KEPT or name.startswith(f".tmp-link-{os.getpid()}-"):
            return True
        path = self._store.directory.child(name)
        if self._is_protected(path):
            return True
        for ending in _COMPANIONS:
            if name.endswith(ending) and self._is_protected(StorePath(path[: -len(ending)])):
                return True
        return False

    def _is_protected(self, path: StorePath) -> bool:
        return path in self._protected or path in self._touched

    # --- choosing what to delete ------------------------------------------------------

    def choose_all(self) -> None:
        """Delete all that is dead: leftovers first, then items, to a limit in random order."""
        self._due_names = deque(self._leftovers)
        rows = list(self._marked.dead)
        if not self._rules.keep_outputs:
            rows.reverse()  # outputs are younger than their derivations, see `_keep`
        if self._rules.max_freed != NO_LIMIT:
            # Otherwise the limit would always save the same ones.
            random.shuffle(rows)
        self._due = self._marked.referrers_first(rows)

    def choose(self, paths: Iterable[StorePath]) -> None:
        """Delete PATHS, in their order, and the dead items that refer to them.

        They end before the first that is still alive, which `check_gone` tells.
        """
        rows: list[int] = []
        for path in paths:
            if path in self._rows and path not in self._touched:
                rows.append(self._rows[path])
            elif self._store.database.is_valid(path) or self._is_kept(path.base):
                self._alive_path = path
                break
            else:
                self._due_names.append(path.base)
            self._chosen.append(path)
        self._due = self._marked.referrers_first(rows)

    def check_gone(self) -> None:
        """Test that a whole sweep has made away with all that `choose` was given.

        :raises StoreError: something is still alive, or somebody uses it again.
        """
        if self._full:
            return
        valid = self._store.database.valid_in_order(self._chosen)
        path = valid[0] if valid else self._alive_path
        if path is not None:
            raise StoreError(f"cannot delete path `{path}' since it is still alive")

    # --- sweeping -------------------------------------------------------------------

    def open_trash(self) -> None:
        """Empty and make the directory for what is not an item any more; for a thread."""
        store = self._store.directory.path
        self._fd = os.open(store, DIRECTORY_FLAGS & ~os.O_NOFOLLOW)
        self.freed += self._remove(self._fd, TRASH)
        try:
            os.mkdir(TRASH, 0o700, dir_fd=self._fd)
            self._trash = os.open(TRASH, DIRECTORY_FLAGS, dir_fd=self._fd)
        except OSError as error:
            if error.errno != ENOSPC:
                raise StoreError(f"cannot make the trash: {error.strerror}") from error
            self._report("the disk is full, so that things are deleted where they are")

    def is_full(self) -> bool:
        """Whether as much has been freed as was wanted."""
        return self._full

    def sweep(self, seconds: float) -> bool:
        """Make away with as much as SECONDS allow; in the reactor's thread.

        What was moved is removed by `empty`.

        :return: whether there is more to do.
        :raises Busy: another process writes to the database; call it again.
        """
        end = time.monotonic() + seconds
        while not self.is_full():
            if self._due_names:
                for _ in range(min(_NAMES, len(self._due_names))):
                    self._leftover(self._due_names.popleft())
                    if self.is_full():
                        break
            else:
                batch = self._batch()
                if not batch:
                    return False
                self._items(batch)
            if time.monotonic() >= end:
                return not self.is_full()
        return False

    def _batch(self) -> list[DeadItem]:
        """Return the next items that may go."""
        batch: list[DeadItem] = []
        room = self._rules.max_freed - self.freed - self._expected
        for item in self._due:
            if item.path in self._touched:
                self._keep(item.path)
                continue
            batch.append(item)
            room -= item.size
            if len(batch) >= _ITEMS or room < 0:
                break
        return batch

    def _keep(self, path: StorePath) -> None:
        """See to it that what belongs to the touched PATH stays, too; references do anyway."""
        database, rules = self._store.database, self._rules
        related: list[StorePath] = []
        info = database.find_path_info(path)
        if info is None:
            return
        if rules.keep_derivations and info.deriver is not None:
            related.append(info.deriver)
        if rules.keep_outputs and path.is_derivation:
            related += database.derivation_outputs(path).values()
        self._touched.update(related)

    def _items(self, batch: list[DeadItem]) -> None:
        try:
            gone = self._store.invalidate_unused(batch)
        except BaseException:
            self._due = _chained(batch, self._due)
            raise
        reached("gc.invalidated")
        for item in gone:
            self._delete(item.path, item.size)

    def _leftover(self, name: str) -> None:
        path = self._store.directory.child(name)
        if not self._is_kept(name) and not self._store.database.is_valid(path):
            self._delete(path, 0)

    def _delete(self, path: StorePath, size: int) -> None:
        """Take PATH, which is not valid, out of the store; trees and large files by the trash."""
        name, most_links = path.base, self._rules.most_links
        try:
            status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except (FileNotFoundError, ValueError):  # or no file can have that name
            return
        except OSError as error:
            raise StoreError(f"cannot delete '{path}': {error.strerror}") from error
        self._report(f"[{self._progress()}] deleting '{path}'")
        self.found.add(path)
        try:
            if stat.S_ISDIR(status.st_mode):
                self._move(name)
                self._expected += size
            elif status.st_size <= _SMALL:
                os.unlink(name, dir_fd=self._fd)
                self.freed += status.st_size if status.st_nlink <= most_links else 0
            else:
                self._move(name)
                self._expected += status.st_size if status.st_nlink <= most_links else 0
        except FileNotFoundError:
            pass  # by the build that makes it anew
        except OSError as error:
            if error.errno != ENOSPC:
                raise StoreError(f"cannot delete '{path}': {error.strerror}") from error
            self.freed += remove(self._fd, name, max_links=most_links)
        if self.freed + self._expected > self._rules.max_freed:
            self._full = True
            self._report(f"deleted more than {self._rules.max_freed} bytes; stopping")

    def _move(self, name: str) -> None:
        """Move NAME into the trash.

        :raises OSError: it cannot be moved.
        """
        if self._trash < 0:
            raise OSError(ENOSPC, "there is no trash")
        self._moves += 1
        new = f"{self._moves}-{name}"[:255]
        move(self._fd, name, self._trash, new)
        self._moved.append(new)
        reached("gc.trashed")

    def _progress(self) -> str:
        done = self.freed + self._expected
        if self._rules.max_freed == NO_LIMIT:
            return size_text(done)
        return f"{min(100, 100 * done // max(1, self._rules.max_freed))}%"

    # --- afterwards ------------------------------------------------------------------

    def unlock(self) -> None:
        """Let everybody go on: nothing is made invalid any more."""
        self._others.close()
        if self._store.collecting.touched is self._touched:
            self._store.collecting.end()

    def take_moved(self) -> list[str]:
        """Return what is new in the trash, for `empty`."""
        moved, self._moved = self._moved, []
        return moved

    def empty(self, names: Iterable[str]) -> int:
        """Remove NAMES from the trash and return how many bytes that freed; for a thread."""
        freed = 0
        for name in names:
            freed += self._remove(self._trash, name)
            reached("gc.removed")
        return freed

    def _remove(self, dir_fd: int, name: str) -> int:
        return remove(dir_fd, name, max_links=self._rules.most_links, check=self._check)

    def remove_trash(self) -> None:
        """Remove what is left of the trash; for a thread."""
        self.freed += self._remove(self._fd, TRASH)

    def close(self) -> None:
        """Give everything back, also in the middle; what is in the trash stays for the next."""
        self.unlock()
        for fd in self._trash, self._fd:
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)
        self._trash = self._fd = -1


def _chained(batch: list[DeadItem], rest: Iterator[DeadItem]) -> Iterator[DeadItem]:
    yield from batch
    yield from rest
