"""Sharing the files of the whole store on demand (spec: protocol §5, op 34; store §9)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from guixd.build.request import Level
from guixd.formats import operations as op
from guixd.formats.path import StorePath
from guixd.formats.sizes import short_size, size_text
from guixd.service.session import Handlers, Session
from guixd.service.sweep import Progress, in_parallel, in_thread
from guixd.store.items import Row
from guixd.store.links import SMALLEST
from guixd.store.optimise import Optimisation
from guixd.store.roots import TempRoots
from guixd.store.survey import Survey


async def optimise(session: Session, _request: op.OptimiseStore) -> None:
    """Share the equal files of all valid items."""
    store, daemon = session.store, session.daemon
    work = Optimisation(store.directory.path)
    # An item cannot be smaller than its files.
    survey = Survey(store.database, SMALLEST)
    progress = Progress(daemon.reactor)
    items = files = freed = 0

    async def run() -> None:
        nonlocal items, files, freed
        while rows := await session.when_free(survey.take):
            roots = store.temp_roots()
            try:
                valid = await _protect(session, roots, rows)
                saved = await in_thread(
                    daemon, work.stop, work.share, [path.base for path in valid]
                )
            finally:
                roots.close()
            for note in saved.notes:
                session.log.log(Level.INFO, note)
            items, files, freed = items + len(rows), files + saved.files, freed + saved.freed
            if progress.due():
                text = f"{items} items looked at, {short_size(freed)} freed"
                session.log.log(Level.INFO, text)

    try:
        await in_thread(daemon, work.stop, work.begin)
        await in_parallel(run)
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
