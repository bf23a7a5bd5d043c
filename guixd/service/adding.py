"""Requests that add to the store (spec: protocol §5, op 7 and 8; store §4, §5).

The archive of op 7 follows the request.  A small one that has come whole is
taken in at once.  Otherwise blocks go to a worker thread, which checks, hashes
and writes them in one pass, and the client is held back while `MOST_WAITING`
bytes wait for it, so that memory does not grow with the archive.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from guixd.formats import operations as op
from guixd.formats.path import StorePath
from guixd.service.session import Handlers, Session

if TYPE_CHECKING:
    from guixd.store.addition import Addition

_log = Logger()

INLINE = 64 * 1024
"""Most bytes that are taken in by the reactor's thread."""
MOST_WAITING = 2 * 1024 * 1024


class Intake:
    """Feeds an `Addition` with what a connection receives."""

    def __init__(self, session: Session, addition: Addition) -> None:
        self._connection = session.connection
        self._threads = session.daemon.threads
        self._addition = addition
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._feeding = False
        self._paused = False
        self._cancelled = False
        self.done: Deferred[None] = Deferred(self._cancel)
        """Fires when the archive is whole; fails with `BadArchive`."""

    def received(self, data: bytes) -> None:
        """Take DATA in, later if it is much."""
        if not self._feeding and len(data) <= INLINE:
            try:
                used = self._addition.feed(data)
            except Exception:
                self._finish(Failure())
            else:
                if self._addition.complete:
                    self._connection.give_back(memoryview(data)[used:])
                    self._finish(None)
            return
        self._waiting.append(data)
        self._size += len(data)
        if self._size >= MOST_WAITING and not self._paused:
            self._paused = True
            self._connection.pause()
        if not self._feeding:
            self._feed()

    def _feed(self) -> None:
        """Give all that waits to a thread."""
        blocks = list(self._waiting)
        self._waiting.clear()
        self._size = 0
        self._feeding = True
        self._threads(self._feed_blocks, blocks).addCallbacks(self._fed, self._failed)
        if self._paused:
            self._paused = False
            self._connection.resume()

    def _feed_blocks(self, blocks: list[bytes]) -> bytes | None:
        """Feed BLOCKS, in a thread; return what comes after the archive, if it is whole."""
        for index, block in enumerate(blocks):
            used = self._addition.feed(block)
            if self._addition.complete:
                return b"".join([block[used:], *blocks[index + 1 :]])
        return None

    def _fed(self, rest: bytes | None) -> None:
        self._feeding = False
        if rest is not None and not self.done.called:
            self._connection.give_back(b"".join([rest, *self._waiting]))
            self._finish(None)
        elif self.done.called:
            self._finish(None)
        elif self._waiting:
            self._feed()

    def _failed(self, failure: Failure) -> None:
        self._feeding = False
        self._finish(failure)

    def _finish(self, result: Failure | None) -> None:
        self._waiting.clear()
        if not self.done.called:
            self.done.callback(result)
        if self._idle is not None:
            self._idle.callback(None)

    async def discard(self) -> None:
        """Remove what was written, when no thread writes any more."""
        if self._feeding:
            self._idle = Deferred()
            await self._idle
        await self._threads(self._addition.discard)


def add(session: Session, request: op.AddToStore) -> StorePath | Coroutine[Any, Any, StorePath]:
    """Take in the archive that follows REQUEST."""
    # The archive is still part of the arguments.
    session.log.working = False
    addition = session.store.begin_addition(
        request.name, request.algorithm, request.recursive, session.roots
    )
    intake = Intake(session, addition)
    session.connection.take_over(intake)
    if intake.done.called:
        try:
            return _commit(session, addition)
        except Busy:
            pass
    return _add_later(session, addition, intake)


async def _add_later(session: Session, addition: Addition, intake: Intake) -> StorePath:
    try:
        await intake.done
        return await session.when_free(lambda: _commit(session, addition))
    finally:
        pass


def _commit(session: Session, addition: Addition) -> StorePath:
    """Make a complete ADDITION valid."""
    session.log.working = True
    return session.store.commit_addition(addition, session.roots)


def add_text(
    session: Session, request: op.AddTextToStore
) -> StorePath | Coroutine[Any, Any, StorePath]:
    """Add a file whose contents and references the client names."""


HANDLERS: Handlers = {op.AddToStore: add, op.AddTextToStore: add_text}
