"""Comparing the store with what the database says of it (spec: protocol §5, op 35; store §11)."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable
from functools import partial
from typing import Any

from twisted.internet.task import deferLater

from guixd.build.request import Level
from guixd.errors import Busy, GuixdError, NotAllowed, StoreError
from guixd.faults import reached
from guixd.formats import operations as op
from guixd.formats.path import StorePath
from guixd.service.repairing import repair
from guixd.service.session import Handlers, Session
from guixd.service.sweep import Progress, in_parallel, in_thread
from guixd.store.items import Row
from guixd.store.local import LocalStore
from guixd.store.survey import Survey
from guixd.store.verify import Finding, Verification, exists, lost, missing

_AT_ONCE = 50
"""How many lost items are dropped before others have their turn."""


def verify(session: Session, request: op.VerifyStore) -> Coroutine[Any, Any, bool]:
    """Verify the store, and maybe repair it; whether errors remain."""
    if request.repair and not session.trusted:
        raise NotAllowed("repairing the store is a privileged operation")
    return _Verify(session, request.repair).run(request.check_contents)


class _Verify:
    """One verification for one client."""

    def __init__(self, session: Session, repairs: bool) -> None:
        self._session = session
        self._store = session.store
        self._repairs = repairs
        self._errors = False
        self._lost: set[StorePath] = set()  # which stay valid nevertheless
        self._items = 0
        self._ready: dict[int, list[Finding]] = {}
        self._next = 0
        self._telling = False

    async def run(self, check_contents: bool) -> bool:
        self._log(Level.ERROR, "reading the store...")
        await self._check_existence()
        if check_contents:
            self._log(Level.INFO, "checking hashes...")
            await self._check_contents()
        return self._errors

    def _log(self, level: Level, text: str) -> None:
        self._session.log.log(level, text)

    def _error(self, text: str) -> None:
        self._errors = True
        self._log(Level.ERROR, text)

    # --- whether everything is there ----------------------------------------------------

    async def _check_existence(self) -> None:
        candidates = await self._session.daemon.threads(_missing, self._store)
        self._log(Level.INFO, "checking path existence...")
        if not candidates:
            return
        # No collector may be at work while it is decided what has got lost.
        collecting = self._store.collecting
        await self._session.when_free(collecting.begin)
        try:
            for start in range(0, len(candidates), _AT_ONCE):
                if start:
                    await deferLater(self._session.daemon.reactor, 0)
                for path in candidates[start : start + _AT_ONCE]:
                    await self._session.when_free(partial(self._check_lost, path))
        finally:
            collecting.end()
        for path in sorted(self._lost):
            self._log(Level.ERROR, f"path `{path}' disappeared, but it still has valid referrers!")
            if not self._repairs:
                self._errors = True
            elif await self._repair(path, f"warning: cannot repair path `{path}'"):
                self._lost.discard(path)

    def _check_lost(self, path: StorePath) -> None:
        """Drop PATH, which seems to be lost, and what goes with it, if nothing needs it."""
        database, directory = self._store.database, self._store.directory
        if not database.is_valid(path):
            return
        if not directory.has_child(path):
            self._drop(path, f"path `{path}' is not in the store, removing from database...")
        elif not exists(path):
            for item in lost(path, database.referrers, exists):
                if any(referrer != item for referrer in database.referrers(item)):
                    self._lost.add(item)
                else:
                    self._drop(item, f"path `{item}' disappeared, removing from database...")

    def _drop(self, path: StorePath, text: str) -> None:
        try:
            self._store.invalidate(path)
        except Busy:
            raise
        except StoreError as error:
            self._error(error.text)
        else:
            self._lost.discard(path)
            self._log(Level.ERROR, text)
            reached("verify.dropped")

    # --- whether everything is as it was --------------------------------------------------

    async def _check_contents(self) -> None:
        session = self._session
        work = Verification(self._store.directory.path)
        survey = Survey(self._store.database)
        progress = Progress(session.daemon.reactor)
        taken = 0

        async def run() -> None:
            nonlocal taken
            while rows := await session.when_free(survey.take):
                number, taken = taken, taken + 1
                found = await in_thread(
                    session.daemon, work.stop, work.check, self._of_interest(rows)
                )
                await self._tell(number, found)
                self._items += len(rows)
                if progress.due():
                    self._log(Level.INFO, f"{self._items} items checked")

        try:
            await in_parallel(run)
        finally:
            work.stop()

    def _of_interest(self, rows: Iterable[Row]) -> list[Row]:
        has_child = self._store.directory.has_child
        return [row for row in rows if row.path not in self._lost and has_child(row.path)]

    async def _tell(self, number: int, found: list[Finding]) -> None:
        """Treat what was FOUND in the part NUMBER, and others that wait, in their order."""
        self._ready[number] = found
        if self._telling:
            return
        self._telling = True
        while self._next in self._ready:
            findings = self._ready.pop(self._next)
            self._next += 1
            for finding in findings:
                await self._treat(finding)
        self._telling = False

    async def _treat(self, finding: Finding) -> None:
        path = finding.row.path
        if finding.is_incomplete:
            await self._session.when_free(partial(self._complete, finding))
            return
        again = await self._look_again(path)
        if again is None:
            return
        if again.error:
            self._error(f"error: {again.error}")
            if not self._repairs:
                return
        else:
            expected = again.row.hash_text.removeprefix("sha256:")
            self._log(
                Level.ERROR,
                f"path `{path}' was modified! expected hash `{expected}',"
                f" got `{again.digest.hex()}'",
            )
        if not self._repairs:
            self._errors = True
        else:
            await self._repair(path, f"error: cannot repair path `{path}'")

    async def _look_again(self, path: StorePath) -> Finding | None:
        """Return what is wrong with PATH, if it still is: it may have been collected."""
        session, database = self._session, self._store.database
        roots = self._store.temp_roots()
        work = Verification(self._store.directory.path)
        try:
            await session.when_free(partial(roots.add, path))
            row = await session.when_free(partial(database.find_row, path))
            if row is None:
                return None
            found = await in_thread(session.daemon, work.stop, work.check, [row])
        finally:
            roots.close()
        if not found or found[0].is_incomplete:
            return None
        return found[0]

    def _complete(self, finding: Finding) -> None:
        """Write down what the database does not know of an item."""
        row, database = finding.row, self._store.database
        if database.find_row(row.path) == row:
            self._log(Level.INFO, f"completing what is known of `{row.path}'")
            database.set_hash(row.path, finding.digest, finding.size)
            reached("verify.completed")

    async def _repair(self, path: StorePath, failure: str) -> bool:
        """Repair PATH; if that is impossible, show FAILURE and why."""
        try:
            await repair(self._session, path)
            if await self._look_again(path) is None:
                return True
        except GuixdError as error:
            if error.text not in failure:
                self._log(Level.ERROR, error.text)
        self._error(failure)
        return False


def _missing(store: LocalStore) -> list[StorePath]:
    queries = store.database.read_only_copy()
    try:
        return missing(queries, store.directory)
    finally:
        queries.close()


HANDLERS: Handlers = {op.VerifyStore: verify}
