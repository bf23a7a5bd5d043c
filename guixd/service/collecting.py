"""Collecting garbage, and its roots (spec: protocol §5, op 12, 13, 14 and 20; gc).

A collection is a row of short steps in the reactor's thread, between which everybody has
a turn, while worker threads look for what is alive and remove files.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from guixd.build.request import Level
from guixd.build.threads import to_the_end
from guixd.errors import NotAllowed, StoreError
from guixd.formats import operations as op
from guixd.formats.operations import encode_reply
from guixd.formats.path import StorePath
from guixd.service.session import Encoded, Handlers, Session
from guixd.store.collector import TRASH, Collection, Rules
from guixd.store.layout import spending_reserve
from guixd.store.poolcare import clean_pool

T = TypeVar("T")
STEP = 0.002
"""Seconds of a collection after which others have their turn."""
LIVE, DEAD, DELETE_DEAD, DELETE_SPECIFIC = range(4)


def collect(session: Session, request: op.CollectGarbage) -> Coroutine[Any, Any, Encoded]:
    """Collect as REQUEST says."""
    if request.ignore_liveness:
        raise NotAllowed("you are not allowed to ignore liveness")
    if request.action > DELETE_SPECIFIC:
        raise StoreError(f"unknown action {request.action} of the garbage collector")
    return _Collecting(session, request).run()


class _Remover:
    """Removes what lies in the trash, in a thread, while more of it comes."""

    def __init__(self, session: Session, collection: Collection) -> None:
        self._threads = session.daemon.threads
        self._collection = collection
        self._running: Deferred[None] | None = None
        self._failure: Failure | None = None
        self.freed = 0

    def go_on(self) -> None:
        """Begin with what has been moved, unless it is being done."""
        if self._running is not None or self._failure is not None:
            return
        names = self._collection.take_moved()
        if names:
            self._running = Deferred()
            self._threads(self._collection.empty, names).addCallbacks(self._removed, self._failed)

    def _removed(self, freed: int) -> None:
        self.freed += freed
        self._end()
        self.go_on()

    def _failed(self, failure: Failure) -> None:
        self._failure = failure
        self._end()

    def _end(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.callback(None)

    async def finish(self) -> None:
        """Wait until all is gone.

        :raises StoreError: something could not be removed.
        """
        while self._running is not None:
            # Not the Deferred itself: who is cancelled must not take it away from us.
            waiting: Deferred[None] = Deferred()
            self._running.addCallback(waiting.callback)
            await waiting
        if self._failure is not None:
            self._failure.raiseException()

    async def stop(self) -> None:
        """Begin nothing more, and wait until no thread is at work, also if cancelled."""
        self._collection.take_moved()
        while self._running is not None:
            with suppress(StoreError, OSError, CancelledError):
                await self.finish()


class _Collecting:
    """One collection for one client."""

    def __init__(self, session: Session, request: op.CollectGarbage) -> None:
        self._session = session
        self._request = request
        self._left = False
        self._lines: list[str] = []

    def _rules(self) -> Rules:
        options = self._session.options
        settings = options.effective_settings()
        return Rules(
            keep_outputs=settings.gc_keep_outputs,
            keep_derivations=settings.gc_keep_derivations,
            max_freed=self._request.max_freed,
            most_links=2 if options.deduplicate else 1,
        )

    def _tell(self) -> None:
        lines = self._lines[:]
        del self._lines[: len(lines)]  # a thread may be adding more
        for text in lines:
            self._session.log.log(Level.INFO, text)

    def _say(self, level: Level, text: str) -> None:
        self._tell()
        self._session.log.log(level, text)

    async def run(self) -> Encoded:
        session = self._session
        await session.when_free(session.store.collecting.begin)
        try:
            collection = Collection(
                session.store, session.roots, self._rules(), self._lines.append, self._check
            )
        except BaseException:
            session.store.collecting.end()
            raise
        try:
            database = session.store.directories.database
            with spending_reserve(database) if self._deletes else nullcontext():
                return await self._collect(collection)
        finally:
            self._tell()
            collection.close()

    @property
    def _deletes(self) -> bool:
        return self._request.action in (DELETE_DEAD, DELETE_SPECIFIC)

    async def _collect(self, collection: Collection) -> Encoded:
        action = self._request.action
        self._say(Level.ERROR, "finding garbage collector roots...")
        await self._in_thread(partial(collection.mark, strict=self._deletes))
        if not self._deletes:
            self._say(Level.ERROR, "determining live/dead paths...")
            return await self._reply(collection.alive if action == LIVE else collection.dead)
        await self._in_thread(collection.open_trash)
        remover = _Remover(self._session, collection)
        try:
            await self._delete(collection, remover)
            collection.unlock()
            trash = self._session.store.directory.child(TRASH)
            self._say(Level.INFO, f"deleting `{trash}'")
            await remover.finish()
        except CancelledError:
            self._leave()
            raise
        finally:
            await remover.stop()
        await self._in_thread(collection.remove_trash)
        self._say(Level.ERROR, "deleting unused links...")
        store = self._session.store.directory.path
        freed = await self._in_thread(
            partial(clean_pool, store, self._lines.append, lambda: self._left)
        )
        total = collection.freed + remover.freed + freed
        return await self._reply(lambda: tuple(sorted(collection.found)), total)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Wait for WORK in a thread; when this is given up, it is over, too."""
        result = await to_the_end(self._session.daemon.threads(work), self._leave)
        self._tell()
        return result

    def _leave(self) -> None:
        self._left = True

    def _check(self) -> None:
        """Go on only if the client is still there; what is in the trash is for the next."""
        if self._left:
            raise CancelledError

    async def _reply(self, paths: Callable[[], tuple[StorePath, ...]], freed: int = 0) -> Encoded:
        """Make the reply in a thread, as there may be very many PATHS."""
        request = self._request
        return await self._in_thread(
            lambda: Encoded(encode_reply(request, op.Collected(paths(), freed)))
        )

    async def _delete(self, collection: Collection, remover: _Remover) -> None:
        if self._request.action == DELETE_SPECIFIC:
            collection.choose(sorted(set(self._request.paths)))
            await self._sweep(collection, remover)
            collection.check_gone()
        elif self._request.max_freed:
            self._say(Level.ERROR, "deleting garbage...")
            collection.choose_all()
            await self._sweep(collection, remover)

    async def _sweep(self, collection: Collection, remover: _Remover) -> None:
        session = self._session
        while await session.when_free(partial(collection.sweep, STEP)):
            remover.go_on()
            self._tell()
            session.daemon.tidy()
            await deferLater(session.daemon.reactor, 0)
        remover.go_on()
        self._tell()


def add_indirect_root(
    session: Session, request: op.AddIndirectRoot
) -> Coroutine[Any, Any, None] | None:
    """Make a root of what a link points to."""
    session.store.add_indirect_root(request.path)
    if session.store.collecting.touched is not None:
        return _honour_roots(session)
    return None


def sync_with_gc(session: Session, _request: op.SyncWithGC) -> Coroutine[Any, Any, None] | None:
    """Return when roots that there are by now count, whatever collection runs."""
    if session.store.collecting.touched is not None:
        return _honour_roots(session)
    session.store.collecting.pass_by()
    return None


async def _honour_roots(session: Session) -> None:
    """Let the collection that runs keep what has become a root since it began."""
    roots = await session.daemon.threads(session.store.find_roots)
    touched = session.store.collecting.touched
    if touched is not None:
        touched.update(item for _, item in roots)


async def find_roots(session: Session, _request: op.FindRoots) -> tuple[tuple[str, str], ...]:
    lines: list[str] = []
    roots = await session.daemon.threads(session.store.find_roots, lines.append)
    for line in lines:
        session.log.log(Level.INFO, line)
    return roots


HANDLERS: Handlers = {
    op.CollectGarbage: collect,
    op.AddIndirectRoot: add_indirect_root,
    op.SyncWithGC: sync_with_gc,
    op.FindRoots: find_roots,
}
