"""Requests that look at the whole store (spec: protocol §5, op 34; store §9).

Worker threads look at some items at a time, so that others have their turn, and the
client may leave at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from guixd.build.request import Level
from guixd.formats import operations as op
from guixd.formats.path import StorePath
from guixd.formats.sizes import size_text
from guixd.service.session import Handlers, Session
from guixd.store.optimise import Optimisation
from guixd.store.roots import TempRoots
from guixd.store.survey import Row, Survey

WORKERS = 2
"""How many threads look at the store for one client; others need some, too."""
PROGRESS = 5.0
"""Seconds after which the client is told how far it is."""


class Progress:
    """Knows when to tell a client how far a long request is."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._next = clock.seconds() + PROGRESS

    def due(self) -> bool:
        """Whether it is time to tell it now."""
        now: float = self._clock.seconds()
        if now < self._next:
            return False
        self._next = now + PROGRESS
        return True


async def in_parallel(count: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do WORK in COUNT coroutines until all of them end.

    If one fails, or the caller is cancelled, the others are cancelled.
    """
    running = [Deferred.fromCoroutine(work()) for _ in range(count)]
    failures: list[Failure] = []

    def failed(failure: Failure) -> None:
        failures.append(failure)
        cancel()

    def cancel() -> None:
        for one in running:
            one.cancel()

    for one in running:
        one.addErrback(failed)
    try:
        await DeferredList(running)
    finally:
        cancel()
    if failures:
        failures[0].raiseException()


async def optimise(session: Session, _request: op.OptimiseStore) -> None:
    """Share the equal files of all valid items."""
    store, threads = session.store, session.daemon.threads
    work = Optimisation(store.directory.path)
    survey = Survey(store.database)
    progress = Progress(session.daemon.reactor)
    items = files = freed = 0

    async def run() -> None:
        nonlocal items, files, freed
        while rows := await session.when_free(survey.take):
            roots = store.temp_roots()
            try:
                valid = await _protect(session, roots, rows)
                saved = await threads(work.share, [path.base for path in valid])
            finally:
                roots.close()
            for note in saved.notes:
                session.log.log(Level.INFO, note)
            items, files, freed = items + len(rows), files + saved.files, freed + saved.freed
            if progress.due():
                text = f"{items} items looked at, {size_text(freed).strip()} freed"
                session.log.log(Level.INFO, text)

    try:
        await threads(work.begin)
        await in_parallel(WORKERS, run)
    finally:
        work.stop()
    session.log.log(Level.ERROR, f"{size_text(freed)} freed by hard-linking {files} files")


async def _protect(session: Session, roots: TempRoots, rows: Iterable[Row]) -> Sequence[StorePath]:
    """Protect the items ROWS from collectors by ROOTS; return those that are still valid."""
    store = session.store
    paths = [row.path for row in rows if store.directory.has_child(row.path)]
    for path in paths:
        await session.when_free(partial(roots.add, path))
    return await session.when_free(partial(store.database.valid_in_order, paths))


HANDLERS: Handlers = {op.OptimiseStore: optimise}
