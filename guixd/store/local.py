"""The store of this machine: its items, their files and what is known of them.

One `LocalStore` owns all of it.  Its methods run in the reactor's thread, where they
are short, except those that say otherwise.  What another process prevents for the
moment raises `Busy`; the caller tries again a little later.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pwd
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from guixd.errors import BadDerivation, Busy, PathNotValid, StoreError
from guixd.faults import reached
from guixd.formats import derivation
from guixd.formats.derivation import Derivation, HashCache
from guixd.formats.nar import file_size, nar_of_file
from guixd.formats.path import StoreDirectory, StorePath
from guixd.settings import Directories
from guixd.store import layout, roots
from guixd.store.addition import Addition
from guixd.store.database import Database
from guixd.store.derivations import Derivations, Read, Sparingly, TooMany, contents
from guixd.store.durability import Durability
from guixd.store.items import Registration
from guixd.store.links import Links
from guixd.store.liveness import DeadItem
from guixd.store.locks import FileLock, PathLocks, check_lockable
from guixd.store.placing import move, write_item
from guixd.store.queries import Queries
from guixd.store.roots import Collecting, TempRoots
from guixd.store.staging import Staging

INLINE_TEXT = 256 << 10
"""Up to this size in bytes a text is added in the reactor's thread."""
_MOST_HASHES = 1 << 16
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class PreparedText:
    """A text that can be added."""

    item: Registration
    text: bytes
    derivation: Derivation | None


class LocalStore:
    """The items below one store directory.

    :param directories: where things lie.
    :param build_gid: the group of build users, `None` without them.
    :param reserve: whether to keep space for the database (spec: store §7.5).
    :param ignore_symlinks: whether the store's name may lead through symbolic links.
    :param clock: gives seconds since the epoch.
    :param durable: whether what is valid is to be on disk, see `store.durability`.
    :ivar directory: the store directory as a value.
    :ivar database: what is known of the items; from `open` to `close`.
    :ivar durability: what is known to be on disk; `None` if that is not wanted.
    :ivar collecting: what a collection of garbage learns of sessions, and they of it.
    """

    database: Database

    def __init__(
        self,
        directories: Directories,
        *,
        build_gid: int | None = None,
        reserve: bool = True,
        ignore_symlinks: bool = False,
        clock: Callable[[], float] = time.time,
        durable: bool = True,
    ) -> None:
        self.directories = directories
        self.directory = StoreDirectory(directories.store)
        self.gc_lock_file = directories.state + "/gc.lock"
        self._build_gid = build_gid
        self._reserve = reserve
        self._ignore_symlinks = ignore_symlinks
        self._clock = clock
        self._durable = durable
        self.durability: Durability | None = None
        self._big_lock = FileLock(directories.database + "/big-lock")
        self._alone = True  # as far as we know, nobody else has the big lock
        self._sessions: set[TempRoots] = set()
        self.collecting = Collecting(self.gc_lock_file)
        self._own_roots: TempRoots | None = None
        self._staging: Staging | None = None
        self._derivations = Derivations(self.directory)
        self._hashes: dict[StorePath, bytes] = {}

    def open(self) -> None:
        """Make what is missing and open the database.

        Who may not write to the database can still be told what is in it.

        :raises Busy: another process has the store for itself.
        :raises StoreError: the store cannot be used.
        """
        layout.prepare(
            self.directories, build_gid=self._build_gid, ignore_symlinks=self._ignore_symlinks
        )
        self.reserve_space(self._reserve)
        try:
            read_only = not self._lock_big_lock()
            directory = self.directories.database
            self.database = Database(
                directory,
                self.directory,
                clock=self._clock,
                durable=self._durable and not read_only,
                read_only=read_only,
            )
        except BaseException:
            self._big_lock.close()
            raise
        self._own_roots = self.temp_roots()
        self._staging = Staging(self.directory, self._own_roots)
        durable = self._durable and not read_only
        self.durability = Durability(self.database) if durable else None

    def _lock_big_lock(self) -> bool:
        """Take the big lock; return whether this daemon may write to the store at all."""
        try:
            if self._big_lock.acquire(exclusive=False):
                return True
        except StoreError as error:
            if isinstance(error.__cause__, PermissionError):
                return False
            raise
        raise Busy("waiting for the big lock of the store, which another process has")

    @property
    def closed(self) -> bool:
        """Whether the store is not open."""
        return self._own_roots is None

    def close(self) -> None:
        """Give everything back.  No thread may still use the store."""
        self._own_roots = None
        self._staging = None
        for session in tuple(self._sessions):
            session.close()
        if self.durability is not None:
            with suppress(StoreError):  # then the next daemon looks at it again
                self.durability.settle()
        self.database.close()
        self._big_lock.close()

    def reserve_space(self, wanted: bool) -> None:
        """Keep space for the database on a full disk, or free it."""
        layout.reserve_space(self.directories.database, wanted)

    # --- what is there ----------------------------------------------------------

    def is_valid(self, path: str) -> bool:
        """Whether PATH is a valid item."""
        return self.database.is_valid(path)

    def closure(self, paths: Iterable[StorePath]) -> frozenset[StorePath]:
        """Return PATHS and all that they refer to.

        :raises PathNotValid: one of PATHS is not valid.
        """
        return self.database.closure(paths)

    def read_derivation(self, path: StorePath) -> Derivation:
        """Return the valid derivation PATH.

        :raises PathNotValid: it is not valid.
        :raises BadDerivation: it is no derivation.
        :raises StoreError: it cannot be read.
        """
        if not self.database.is_valid(path):
            raise PathNotValid(f"path '{path}' is not valid")
        return self._derivations.read(path)

    def load_derivation(self, path: StorePath) -> Derivation:
        """Return the derivation PATH, which is known to be valid; may be called in a thread.

        What is raised is as in `read_derivation`.
        """
        return self._derivations.read(path)

    def takes_long_to_read(self, path: StorePath) -> bool:
        """Whether `read_derivation` would keep the reactor for long."""
        return self._derivations.takes_long(path)

    def derivation_outputs(self, path: StorePath) -> Mapping[str, StorePath]:
        """Return the outputs of the valid derivation PATH by name, without reading it.

        :raises PathNotValid: it is not valid.
        """
        known = self._derivations.outputs(path)
        if known is None or not self.database.is_valid(path):
            return self.database.derivation_outputs(path)
        return known

    # --- roots ------------------------------------------------------------------

    def temp_roots(self) -> TempRoots:
        """Return the temporary roots of a new session, which closes them."""
        name = f"{self.temp_root_prefix}{next(_numbers)}"
        file = f"{self.directories.state}/temproots/{name}"
        session = TempRoots(file, self.gc_lock_file, self._sessions.discard, self.collecting)
        self._sessions.add(session)
        return session

    def protected(self, but: TempRoots | None = None) -> set[StorePath]:
        """Return all temporary roots of this process, without those of the session BUT."""
        return {path for session in self._sessions if session is not but for path in session.paths}

    @property
    def temp_root_prefix(self) -> str:
        """What the names of files of temporary roots of this process begin with."""
        return f"{os.getpid()}-"

    def add_indirect_root(self, path: str) -> None:
        """Make a root of what the symbolic link PATH points to (op 12)."""
        roots.add_indirect_root(self.directories.state, path)

    def find_roots(
        self, report: Callable[[str], None] = lambda line: None
    ) -> tuple[tuple[str, StorePath], ...]:
        """Return the permanent roots as pairs of link and item, sorted (op 14); for a thread.

        :param report: gets lines for the user, in that thread.
        """
        queries = self.database.read_only_copy()
        try:
            found = roots.find_roots(
                self.directories.state, self.directory, queries.is_valid, report
            )
        finally:
            queries.close()
        return tuple(found.items())

    def ensure_user_directory(self, user: int | str) -> str | None:
        """Make the profile directory of USER, a uid or a name (spec: store §14).

        :return: why that was not possible, for the user; else `None`.
        """
        try:
            entry = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
        except (KeyError, ValueError):
            return f"user {user} is unknown, so it gets no profile directory"
        return layout.make_user_directory(self.directories.state, entry.pw_name, entry.pw_uid)

    # --- adding -----------------------------------------------------------------

    @property
    def staging(self) -> Staging:
        """The names for what is not yet an item; from `open` to `close`."""
        assert self._staging is not None
        return self._staging

    def add_text(
        self,
        name: str,
        text: bytes,
        references: Collection[StorePath],
        session: TempRoots,
        links: Links | None = None,
    ) -> StorePath:
        """Add a file with the contents TEXT (op 8).

        This takes as long as it takes; see `try_add_text`.

        :param session: the temporary roots that protect the item.
        :param links: where the file is shared with equal ones.
        :raises BadName: NAME has characters that are not allowed.
        :raises BadDerivation: NAME ends in `.drv` and TEXT is not what that must be.
        :raises BadHash: so does a fixed output's hash.
        :raises PathNotValid: one of REFERENCES is not valid.
        :raises Busy: another process is at the same item, or collects.
        """
        path = self.directory.text_path(name, hashlib.sha256(text).digest(), references)
        session.add(path)
        return self._add_text(path, text, references, links, sparing=False)

    def try_add_text(
        self,
        name: str,
        text: bytes,
        references: Collection[StorePath],
        session: TempRoots,
        links: Links | None = None,
    ) -> StorePath | None:
        """Do what `add_text` does, unless it would keep the reactor for long.

        :return: `None` for large texts and for derivations with many inputs that must
            be read first; then `prepare_text` in a thread and `commit_text` do it.
        """
        if len(text) > INLINE_TEXT:
            return None
        path = self.directory.text_path(name, hashlib.sha256(text).digest(), references)
        session.add(path)
        try:
            return self._add_text(path, text, references, links, sparing=True)
        except TooMany:
            return None

    def _add_text(
        self,
        path: StorePath,
        text: bytes,
        references: Collection[StorePath],
        links: Links | None,
        *,
        sparing: bool,
    ) -> StorePath:
        if path.is_derivation:
            if not self.database.is_valid(path):
                read: Read = self._read_input
                if sparing:
                    read = Sparingly(read, self._derivations)
                self._commit_text(self._prepare_text(path, text, references, read), links)
        # The database need not be asked about others: files of valid items are there already.
        elif not (self.database.is_known_valid if self._alone else self.database.is_valid)(path):
            prepared = self._prepare_text(path, text, references, self._read_input)
            self._commit_text(prepared, links)
        return path

    def prepare_text(
        self, name: str, text: bytes, references: Collection[StorePath]
    ) -> PreparedText:
        """Compute and check all that adding TEXT needs, but change nothing; for a thread.

        What is raised is as in `add_text`.
        """
        path = self.directory.text_path(name, hashlib.sha256(text).digest(), references)
        queries = self.database.read_only_copy()
        try:
            return self._prepare_text(
                path, text, references, lambda wanted: self._read_input(wanted, queries)
            )
        finally:
            queries.close()

    def commit_text(
        self, prepared: PreparedText, session: TempRoots, links: Links | None = None
    ) -> StorePath:
        """Add what `prepare_text` returned; what is raised is as in `add_text`."""
        session.add(prepared.item.path)
        self._commit_text(prepared, links)
        return prepared.item.path

    def _prepare_text(
        self, path: StorePath, text: bytes, references: Collection[StorePath], read: Read
    ) -> PreparedText:
        drv = None
        if path.is_derivation:
            drv = derivation.parse(text, self.directory, path)
            self._check(drv, path, references, read)
        digest = hashlib.sha256(nar_of_file(text)).digest()
        item = Registration(path, digest, file_size(len(text)), frozenset(references))
        return PreparedText(item, text, drv)

    def _commit_text(self, prepared: PreparedText, links: Links | None) -> None:
        item, drv = prepared.item, prepared.derivation
        path = item.path
        locks, done = self._exclude(path), False
        try:
            if write_item(path, prepared.text, self.database.is_valid):
                try:
                    reached("text.written")
                    if links is not None:
                        status = os.stat(path, follow_symlinks=False)
                        links.share(None, path, item.nar_hash, status)
                    self.database.add(item, drv)
                except BaseException:
                    os.unlink(path)
                    raise
            done = True
        finally:
            self._admit(locks, done)
        if drv is not None:
            self._derivations.remember(path, drv, item.nar_size)

    def _exclude(self, path: StorePath) -> PathLocks | None:
        """Keep everybody else from making PATH, until `_admit`, which must follow soon.

        :raises Busy: somebody is doing that.
        :raises StoreError: the name is too long.
        """
        check_lockable(path)
        if PathLocks.is_held(path):
            raise Busy(f"'{path}' is being made")
        self._alone = self._big_lock.try_alone()
        if self._alone:
            return None
        locks = PathLocks.acquire([path])
        if locks is None:
            raise Busy(f"another process is making '{path}'")
        return locks

    def _admit(self, locks: PathLocks | None, valid: bool) -> None:
        """Undo `_exclude`, which returned LOCKS, when the path is VALID or will not be made."""
        if locks is None:
            self._big_lock.share()
        else:
            locks.release(delete=valid)

    def begin_addition(
        self,
        name: str,
        algorithm: str,
        recursive: bool,
        *,
        links: Links | None = None,
    ) -> Addition:
        """Begin to receive an item whose name follows from its contents (op 7).

        The files are put beside the items, under a name that is protected from
        collectors.  End with `commit_addition`, and if `is_left` still tells that
        something of it is there, with `discard_addition`.

        :param links: where the files are shared with equal ones.
        :raises Busy: another process collects.
        """
        try:
            staging = self.staging.take()
        except Busy:
            raise
        except StoreError as error:
            # The archive must be read all the same, to find the next request behind it.
            return Addition(self.directory, "", name, algorithm, recursive, refused=error)
        return Addition(self.directory, staging, name, algorithm, recursive, links=links)

    def commit_addition(self, addition: Addition, session: TempRoots) -> StorePath:
        """Make what a complete ADDITION received valid.

        :raises GuixdError: what went wrong in receiving, see `Addition.result`.
        :raises BadDerivation: the item is called a derivation but is none.
        :raises Busy: another process is at the same item, or collects; try it again.
        """
        path = addition.result()
        reached("add.received")
        session.add(path)
        drv = None
        if not self.database.is_valid(path):
            if path.is_derivation:
                drv = addition.derivation or self._derivation(
                    path, addition.derivation_text, (), self._read_input
                )
            self.place(
                addition.staging, Registration(path, addition.nar_hash, addition.nar_size), drv
            )
        if addition.nar_size <= INLINE_TEXT:
            self.discard_addition(addition)
        return path

    def prepare_addition(self, addition: Addition) -> None:
        """Read and check a complete ADDITION that is called a derivation; for a thread.

        What is raised is as in `commit_addition`, which then has less to do.
        """
        addition.derivation = self.check_derivation(addition.result(), addition.derivation_text, ())

    def check_derivation(
        self, path: StorePath, text: bytes | None, references: Collection[StorePath]
    ) -> Derivation:
        """Read TEXT, which is to become the derivation PATH, and check it; for a thread.

        :param text: `None` if it is no text at all.
        :raises BadDerivation: it is not what it must be.
        :raises PathNotValid: a derivation that it builds on is not valid.
        """
        queries = self.database.read_only_copy()
        try:
            return self._derivation(
                path, text, references, lambda wanted: self._read_input(wanted, queries)
            )
        finally:
            queries.close()

    def _derivation(
        self, path: StorePath, text: bytes | None, references: Collection[StorePath], read: Read
    ) -> Derivation:
        if text is None:
            raise BadDerivation(f"cannot read '{path}', which is not a regular file")
        drv = derivation.parse(text, self.directory, path)
        self._check(drv, path, references, read)
        return drv

    def place(
        self,
        staging: str,
        item: Registration,
        drv: Derivation | None = None,
        *,
        locked: bool = False,
    ) -> None:
        """Make the files at STAGING, a name from `staging`, the valid ITEM.

        If the item is valid already, they stay where they are.

        :param drv: the checked contents if ITEM ends in `.drv`.
        :param locked: whether the caller sees to it that nobody else makes ITEM.
        :raises PathNotValid: something that is referred to is not valid.
        :raises Busy: another process is at the same item.
        """
        path = item.path
        locks, done = None if locked else self._exclude(path), False
        try:
            if not self.database.is_valid(path):
                move(staging, path)
                try:
                    reached("add.moved")
                    self.database.add(item, drv)
                except BaseException:
                    os.rename(path, staging)
                    raise
                self.staging.free(staging)
            done = True
        finally:
            if not locked:
                self._admit(locks, done)
        if drv is not None:
            self._derivations.remember(path, drv, item.nar_size)

    def is_left(self, addition: Addition) -> bool:
        """Whether something of ADDITION waits for `discard_addition`."""
        return self._staging is not None and self._staging.has(addition.staging)

    def discard_addition(self, addition: Addition) -> None:
        """Remove what is left of ADDITION; may take long, for a thread."""
        if self.is_left(addition):
            addition.discard()
            self.staging.free(addition.staging)

    def register(self, items: Collection[Registration]) -> None:
        """Make ITEMS valid, whose files are in place, all or none.

        Derivations among them are read and checked first.

        :raises BadDerivation: one of them is not what it must be.
        :raises PathNotValid: something that is referred to is not valid.
        :raises ReferencesCycle: items refer to each other in a circle.
        """
        texts = {
            item.path: derivation.parse(contents(item.path), self.directory, item.path)
            for item in items
            if item.path.is_derivation
        }

        def read(path: StorePath) -> Derivation:
            return texts.get(path) or self._read_input(path)

        for item in items:
            if item.path.is_derivation:
                self._check(texts[item.path], item.path, item.references, read)
        self.database.register(items, texts)
        for item in items:
            if item.path in texts:
                self._derivations.remember(item.path, texts[item.path], item.nar_size)

    def invalidate(self, path: StorePath) -> None:
        """Make PATH invalid; its files stay.

        :raises StoreError: "in use by" another valid item.
        """
        self.database.invalidate(path)
        self._derivations.forget(path)
        self._hashes.pop(path, None)

    def invalidate_unused(self, items: Sequence[DeadItem]) -> list[DeadItem]:
        """Make ITEMS invalid but for those that are in use; see `Database.invalidate_unused`."""
        gone = self.database.invalidate_unused(items)
        for item in gone:
            self._derivations.forget(item.path)
            self._hashes.pop(item.path, None)
        return gone

    def _check(
        self,
        drv: Derivation,
        path: StorePath,
        references: Collection[StorePath],
        read: Read,
    ) -> None:
        if len(self._hashes) > _MOST_HASHES:
            self._hashes.clear()
        cache = HashCache(read, self._hashes)
        derivation.check(drv, path, self.directory, cache, frozenset(references))

    def _read_input(self, path: StorePath, queries: Queries | None = None) -> Derivation:
        # What is remembered of it must be true, so an invalid leftover must not be read.
        if not (queries or self.database).is_valid(path):
            raise PathNotValid(f"the input derivation '{path}' is not valid")
        return self._derivations.read(path)
