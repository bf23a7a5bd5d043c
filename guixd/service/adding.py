"""Requests that add to the store (spec: protocol §5, op 7 and 8; store §4, §5).

The archive of op 7 follows the request.  A small one that comes in one piece is
taken in at once.  Otherwise what comes goes to a worker thread, which checks,
hashes and writes in one pass, and the client is held back while `MOST_WAITING`
bytes wait for the thread, so that memory does not grow with the archive.
"""

from __future__ import annotations

from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from guixd.build.request import Level
from guixd.build.threads import Threads, to_the_end
from guixd.errors import BadArchive, Busy
from guixd.formats import operations as op
from guixd.formats.path import DERIVATION_SUFFIX, StorePath
from guixd.formats.wire import encode_string
from guixd.service.connection import Connection
from guixd.service.session import Handlers, QuickHandlers, QuietError, Session
from guixd.service.settling import settling
from guixd.store.addition import Addition
from guixd.store.links import SMALLEST, Links

INLINE = 32 * 1024
"""Most bytes of an archive that are taken in by the reactor's thread."""
MOST_WAITING = 1024 * 1024


class Intake:
    """Feeds an `Addition` with what a connection receives.

    :ivar done: fires when the archive is whole; fails with `BadArchive`.
    :ivar whole: whether the archive is complete and what follows it is given back.
    """

    def __init__(self, connection: Connection, addition: Addition, threads: Threads) -> None:
        self._connection = connection
        self._addition = addition
        self._threads = threads
        self._waiting: list[bytes] = []
        self._size = 0
        self._begun = False
        self._paused = False
        self._feeding = False
        self.whole = False
        self._idle: Deferred[None] = Deferred()
        self.done: Deferred[None] = Deferred(lambda _: self._waiting.clear())

    def received(self, data: bytes) -> None:
        """Take DATA in, in a thread unless it may be all."""
        if self.done.called:
            return  # something was wrong before, and the connection is about to end
        if not self._begun and len(data) <= INLINE:
            self._begun = True
            try:
                rest = self._feed([data])
            except BadArchive:
                self._failed(Failure())  # type: ignore[no-untyped-call]
            else:
                self._fed(rest)
            return
        self._begun = True
        self._waiting.append(data)
        self._size += len(data)
        if not self._feeding:
            self._start()
        elif self._size >= MOST_WAITING and not self._paused:
            self._paused = True
            self._connection.pause()

    def _start(self) -> None:
        """Give all that waits to a thread."""
        blocks, self._waiting, self._size = self._waiting, [], 0
        self._feeding = True
        self._threads(self._feed, blocks).addCallbacks(self._fed, self._failed)
        if self._paused:
            self._paused = False
            self._connection.resume()

    def _feed(self, blocks: list[bytes]) -> bytes | None:
        """Feed BLOCKS; if the archive ends there, return what follows it."""
        for index, block in enumerate(blocks):
            used = self._addition.feed(block)
            if self._addition.complete:
                return b"".join([block[used:], *blocks[index + 1 :]])
        return None

    def _fed(self, rest: bytes | None) -> None:
        self._feeding = False
        if self.done.called:
            self._idle.callback(None)
        elif rest is not None:
            self._connection.give_back(b"".join([rest, *self._waiting]))
            self.whole = True
            self.done.callback(None)
        elif self._waiting:
            self._start()

    def _failed(self, failure: Failure) -> None:
        self._feeding = False
        if self.done.called:
            self._idle.callback(None)
        else:
            self.done.errback(failure)

    async def idle(self) -> None:
        """Wait until no thread writes any more, also if cancelled; only when `done` has fired."""
        if self._feeding:
            self._idle = Deferred()
            with suppress(CancelledError):
                await to_the_end(self._idle)


def add(session: Session, request: op.AddToStore) -> StorePath | Coroutine[Any, Any, StorePath]:
    """Take in the archive that follows REQUEST."""
    # It is still part of the arguments, so that nothing may be sent.
    session.log.working = False
    store = session.store
    links = _links(session)
    addition = store.begin_addition(request.name, request.algorithm, request.recursive, links=links)
    intake = Intake(session.connection, addition, session.daemon.threads)
    session.connection.take_over(intake)
    # Reading a derivation, and those it builds on, can take long.
    if not intake.whole or request.name.endswith(DERIVATION_SUFFIX):
        return _add_later(session, addition, intake)
    try:
        path = _commit(session, addition)
    except Busy:
        return _add_later(session, addition, intake)
    except BaseException:
        store.discard_addition(addition)
        raise
    if store.is_left(addition):
        store.discard_addition(addition)
    return path


async def _add_later(session: Session, addition: Addition, intake: Intake) -> StorePath:
    store = session.store
    left = True
    try:
        await intake.done
        if addition.name.endswith(DERIVATION_SUFFIX):
            await session.daemon.threads(store.prepare_addition, addition)
        path = await session.when_free(lambda: _commit(session, addition))
        # At once: the name of a used place is soon used again.
        left = store.is_left(addition)
        return path
    except BadArchive as error:
        raise QuietError(error) from error
    finally:
        await intake.idle()
        if left:
            await session.daemon.threads(store.discard_addition, addition)


def _commit(session: Session, addition: Addition) -> StorePath:
    """Make the item of a complete ADDITION valid."""
    session.log.working = True
    path = session.store.commit_addition(addition, session.roots)
    _tell(session, addition.links)
    return path


def _links(session: Session, size: int = SMALLEST) -> Links | None:
    """Return where an item of SIZE bytes is shared with equal ones, if it shall be."""
    if size < SMALLEST or not session.options.deduplicate:
        return None
    return Links(session.store.directory.path)


def _tell(session: Session, links: Links | None) -> None:
    """Tell the client what kept files from being shared."""
    if links is not None:
        links.close()
        for note in links.notes:
            session.log.log(Level.INFO, note)


def add_text(
    session: Session, request: op.AddTextToStore
) -> StorePath | Coroutine[Any, Any, StorePath]:
    """Add a file whose contents and references the client names."""
    path = _try_add_text(session, request)
    return _add_slow_text(session, request) if path is None else path


def _try_add_text(session: Session, request: op.AddTextToStore) -> StorePath | None:
    text = request.text
    links = _links(session, len(text))
    try:
        return session.store.try_add_text(
            request.name, text, request.references, session.roots, links
        )
    finally:
        _tell(session, links)


def quick_add_text(session: Session, request: op.AddTextToStore) -> bytes | None:
    """Add a small text that is no derivation."""
    if request.name.endswith(DERIVATION_SUFFIX) or session.options.settles:
        return None
    path = _try_add_text(session, request)
    if path is None:
        return None
    session.daemon.tidy()
    return encode_string(path)


async def _add_slow_text(session: Session, request: op.AddTextToStore) -> StorePath:
    store = session.store
    prepared = await session.daemon.threads(
        store.prepare_text, request.name, request.text, request.references
    )
    links = _links(session, len(request.text))
    try:
        return await session.when_free(lambda: store.commit_text(prepared, session.roots, links))
    finally:
        _tell(session, links)


QUICK: QuickHandlers = {op.AddTextToStore: quick_add_text}
HANDLERS: Handlers = {op.AddToStore: settling(add), op.AddTextToStore: settling(add_text)}
