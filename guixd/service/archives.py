"""Requests that exchange items with other stores (spec: protocol §5, op 16 and 27; store §12).

Worker threads read, hash and write; the reactor's thread only passes blocks on.  Whoever is
slower, the client or the disk, is waited for.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from twisted.internet.defer import CancelledError

from guixd.build.request import Level
from guixd.build.threads import to_the_end
from guixd.errors import GuixdError, StoreError
from guixd.faults import reached
from guixd.formats import operations as op
from guixd.formats.messages import WRITE
from guixd.formats.path import StorePath
from guixd.formats.wire import encode_int
from guixd.service.answers import Answers
from guixd.service.session import Handlers, Session
from guixd.service.settling import settling
from guixd.store.addition import MOST_DERIVATION
from guixd.store.dump import Block
from guixd.store.exporting import export_item
from guixd.store.importing import Arrival, Import
from guixd.store.links import Links

CHUNK: Final = 64 * 1024
"""Most bytes of one WRITE."""
AT_ONCE: Final = 1024 * 1024
"""Bytes after which what has been read is passed on."""
NAMES_AT_ONCE: Final = 16


async def export(session: Session, request: op.ExportPath) -> None:
    """Write an item to the client, signed if it wants that."""
    store, threads = session.store, session.daemon.threads
    roots = store.temp_roots()
    try:
        await session.when_free(partial(roots.add, request.path))
        info = store.database.path_info(request.path)
        session.log.log(Level.INFO, f"exporting path '{info.path}'")
        keys = session.daemon.settings.directories.configuration if request.sign else None
        blocks = export_item(info, keys)
        reading = threads(_messages, blocks)
        try:
            while messages := await to_the_end(reading):
                reading = threads(_messages, blocks)
                session.connection.send(messages)
                await session.connection.drained()
        except BaseException:
            reading.addErrback(lambda _: None)
            raise
        finally:
            # A generator that runs in a thread cannot be closed.
            reading.addBoth(lambda _: threads(blocks.close))
            reading.addErrback(lambda _: None)
    finally:
        roots.close()


def _messages(blocks: Generator[Block, None, None]) -> bytes:
    """Return the next blocks as WRITE messages; empty at the end."""
    parts: list[Block] = []
    size = 0
    pending = bytearray()
    for block in blocks:
        if len(block) + len(pending) < CHUNK:
            pending += block  # small ones are put together
        else:
            view = memoryview(bytes(pending) + bytes(block) if pending else bytes(block))
            pending = bytearray()
            whole = len(view) - len(view) % CHUNK
            for start in range(0, whole, CHUNK):
                parts += (_CHUNK_HEADER, view[start : start + CHUNK])
            pending += view[whole:]
            size += whole
        if size >= AT_ONCE:
            break
    if pending:
        parts += [WRITE, encode_int(len(pending)), bytes(pending), bytes(-len(pending) % 8)]
    return b"".join(parts)


_CHUNK_HEADER: Final = WRITE + encode_int(CHUNK)


def import_(session: Session, _request: op.ImportPaths) -> object:
    """Read signed items from the client and add them."""
    return _Importing(session).run()


class _Importing:
    """One import for one client."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._store = session.store
        self._threads = session.daemon.threads
        self._held = session.daemon.held_locks
        self._links = Links(self._store.directory.path) if session.options.deduplicate else None
        self._import = Import(self._store.directory, session.daemon.acl, self._links)
        self._names: list[str] = []
        self._paths: list[StorePath] = []

    async def run(self) -> tuple[StorePath, ...]:
        answers = Answers(self._session.connection)
        gone = False
        try:
            await self._read(answers)
        except CancelledError:
            gone = True  # so that there will be no more answers
            raise
        finally:
            try:
                await to_the_end(self._threads(self._import.discard))
            except CancelledError:
                gone = True  # and what there was is discarded
            for name in self._names:
                self._store.staging.free(name)
            self._tell()
            if not gone:
                await answers.finish()
        return tuple(self._paths)

    async def _read(self, answers: Answers) -> None:
        arriving = self._import
        while not arriving.complete:
            answers.expect(arriving.needed)
            data = await answers.take()
            if not data:
                raise StoreError("unexpected end of file: the archive is not complete")
            used = 0
            while used < len(data) and not arriving.complete:
                await self._take_names()
                wrong: GuixdError | None = None
                try:
                    used += await to_the_end(self._threads(arriving.feed, data[used:]))
                except GuixdError as error:
                    wrong = error
                while arriving.arrived:  # also what came before something that is wrong
                    await self._place(arriving.arrived[0])
                    arriving.arrived.pop(0)
                if wrong is not None:
                    raise wrong

    async def _take_names(self) -> None:
        while len(self._import.names) < NAMES_AT_ONCE:
            name = await self._session.when_free(self._store.staging.take)
            self._names.append(name)
            self._import.names.append(name)

    async def _place(self, arrival: Arrival) -> None:
        """Make what has arrived an item, unless it is there already."""
        session, store, item = self._session, self._store, arrival.item
        path = item.path
        await session.when_free(partial(session.roots.add, path))
        if not store.database.is_valid(path):
            drv = None
            if path.is_derivation:
                text = await to_the_end(self._threads(_text, arrival.staging))
                drv = await to_the_end(
                    self._threads(store.check_derivation, path, text, item.references)
                )
            if item.deriver is not None and not store.database.is_valid(item.deriver):
                item = replace(item, deriver=None)
            await session.when_free(
                partial(store.place, arrival.staging, item, drv, locked=path in self._held)
            )
            reached("import.registered")
        if store.staging.has(arrival.staging):
            await to_the_end(self._threads(self._import.remove, arrival))
        else:
            self._names.remove(arrival.staging)
        self._paths.append(path)

    def _tell(self) -> None:
        if self._links is not None:
            self._links.close()
            for note in self._links.notes:
                self._session.log.log(Level.INFO, note)


def _text(file: str) -> bytes | None:
    """Return the contents of FILE, which is to become a derivation; `None` if it is no file."""
    path = Path(file)
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MOST_DERIVATION:
        return None
    return path.read_bytes()


HANDLERS: Handlers = {op.ExportPath: export, op.ImportPaths: settling(import_)}
