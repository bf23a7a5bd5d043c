"""One path being substituted, for all clients that want it (spec: substitutes §7, §8).

It waits for those who make the item already and for a lane, takes the archive in from one
place after the other until one is right, and then, with the lock of the path, makes the
item valid.  The options of the client that came first count.  When the last client leaves,
it is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from guixd.build.broadcast import Observer
from guixd.build.claims import Claims
from guixd.build.foreign import released
from guixd.build.lanes import Lane, Lanes
from guixd.build.request import ClientOptions
from guixd.build.results import Result, Status, result_of
from guixd.build.scheduler import Priority
from guixd.build.servers import Servers
from guixd.build.threads import Threads, to_the_end
from guixd.build.transfer import Transfer
from guixd.build.turns import BUSY_RETRY
from guixd.build.watchdog import Watchdog
from guixd.build.watchers import Event, Watcher
from guixd.errors import Busy, FetchError, GuixdError, WrongHash
from guixd.formats.trace import (
    HashMismatch,
    SubstituterFailed,
    SubstituterStarted,
    SubstituterSucceeded,
)
from guixd.net.codecs import supported
from guixd.net.narinfos import Narinfos, Offer
from guixd.net.places import Place, places
from guixd.net.receiving import FetcherLike
from guixd.store.incoming import Incoming
from guixd.store.links import Links
from guixd.store.local import LocalStore
from guixd.store.locks import PathLocks, is_locked, lock_file

_log = Logger()

NOT_FOUND = "not-found"
_BROKEN = ("body", "timeout", "fetcher")
"""Kinds of errors that may not come again."""


@dataclass(frozen=True, slots=True)
class Means:
    """What every substitution uses."""

    reactor: Any
    threads: Threads
    store: LocalStore
    claims: Claims
    lanes: Lanes
    narinfos: Narinfos
    servers: Servers
    fetcher: FetcherLike


@dataclass(slots=True, eq=False)
class Attachment:
    """A client's part in a substitution.

    :ivar result: fires with the `Result`.
    """

    watcher: Watcher
    result: Deferred[Result] = field(default_factory=Deferred)


class Substitution:
    """The download of one item.

    :param offer: what it is, and where.
    :param repair: whether to do it even if the item is valid.
    :ivar abandoned: whether it was given up.
    :ivar ended: fires with None when nothing of it is left.
    """

    def __init__(
        self,
        means: Means,
        offer: Offer,
        options: ClientOptions,
        priority: Priority,
        *,
        repair: bool = False,
    ) -> None:
        self.path = offer.narinfo.path
        self.abandoned = False
        self.ended: Deferred[None] = Deferred()
        self._means = means
        self.offer = offer
        self._options = options
        self._priority = priority
        self.repairs = repair
        self._attachments: list[Attachment] = []
        self._said: list[Event] = []
        self._running: Deferred[Result] | None = None
        self._watchdog: Watchdog | None = None
        self._lane: Lane | None = None
        self._overtaken = False
        self._expired = ""
        self._result: Result | None = None

    @property
    def stuck(self) -> bool:
        """Whether it waits for what it can never get: it does not need a build's slot."""
        return False

    def start(self) -> None:
        """Begin; to be called once, after the first `attach`."""
        self._running = Deferred.fromCoroutine(self._run())
        self._running.addBoth(self._finish)

    def attach(self, observer: Observer, options: ClientOptions) -> Attachment:
        """Let a client take part from now on; it is told all that went before."""
        attachment = Attachment(Watcher(observer, extended=options.follow_downloads))
        for event in self._said:
            attachment.watcher.tell(event)
        self._attachments.append(attachment)
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """Let a client go; without clients the substitution is given up."""
        if attachment not in self._attachments:
            return
        self._attachments.remove(attachment)
        if not self._attachments and self._result is None:
            self.give_up()

    def give_up(self) -> None:
        """End as soon as nothing of it is left."""
        self.abandoned = True
        self._cancel()

    def overtake(self) -> None:
        """End, as the item has become valid."""
        if not self.repairs:
            self._overtaken = True
            self._cancel()

    def _cancel(self) -> None:
        if self._running is not None:
            self._running.cancel()

    # --- what clients are told -------------------------------------------------------

    def _tell(self, event: Event) -> None:
        self._said.append(event)
        for attachment in self._attachments:
            attachment.watcher.tell(event)

    def _warn(self, text: str) -> None:
        self._tell(Event(text=text))

    def _progress(self, line: str, text: str) -> None:
        if self._watchdog is not None:
            self._watchdog.heard(0)
        now = self._means.reactor.seconds()
        for attachment in self._attachments:
            attachment.watcher.progress(now, line, text)

    # --- its life ----------------------------------------------------------------------

    async def _run(self) -> Result:
        await self._wait_for_others()
        try:
            if self._is_done():
                return Result(Status.ALREADY_VALID)
            await self._go_to(self.offer.sources[0].server)
            self._watchdog = Watchdog(
                self._means.reactor,
                self._expire,
                silence=self._options.max_silent_time,
                total=self._options.timeout,
                size=0,
            )
            await self._substitute()
            return Result(Status.SUBSTITUTED)
        finally:
            if self._watchdog is not None:
                self._watchdog.stop()
            self._leave_lane()

    def _is_done(self) -> bool:
        return not self.repairs and self._means.store.database.is_valid(self.path)

    async def _go_to(self, server: str) -> None:
        """Wait for a lane to SERVER, in place of the one to another."""
        if self._lane is not None and self._lane.server == server:
            return
        client = self._options.client_uid
        acquire = self._means.lanes.acquire
        self._lane = await self._idly(lambda: acquire(server, self._priority, client))

    async def _idly(self, wait: Callable[[], Deferred[Any]]) -> Any:
        """Do WAIT with no lane, and so that it does not count as silence of a server."""
        self._leave_lane()
        if self._watchdog is not None:
            self._watchdog.hold(True)
        result = await wait()
        if self._watchdog is not None:
            self._watchdog.hold(False)
        return result

    def _leave_lane(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            self._means.lanes.release(lane)

    async def _wait_for_others(self) -> None:
        """Let those end who make the item already: a build, or another process."""
        await self._claim()
        self._means.claims.free([self.path])
        file = lock_file(self.path)
        if is_locked(file):
            self._warn(f"waiting for the lock on `{self.path}'")
            await released(self._means.reactor, [file])

    async def _claim(self) -> None:
        waiting = self._means.claims.claim(self.path)
        if waiting is not None:
            await waiting

    async def _commit(self, incoming: Incoming) -> None:
        """Make the item valid, unless somebody else has done that meanwhile."""
        narinfo, database = self.offer.narinfo, self._means.store.database
        await self._idly(lambda: Deferred.fromCoroutine(self._claim()))
        try:
            locks = await self._lock()
            try:
                if not self._is_done():
                    await self._when_free(
                        lambda: incoming.commit(narinfo.references, narinfo.deriver)
                    )
            finally:
                locks.release(delete=database.is_valid(self.path))
        finally:
            self._means.claims.free([self.path])

    async def _lock(self) -> PathLocks:
        """Take the lock file of the path; another process may have it for long."""
        told = False
        while True:
            locks = PathLocks.acquire([self.path])
            if locks is not None:
                return locks
            if not told:
                told = True
                self._warn(f"waiting for the lock on `{self.path}'")
            await self._idly(lambda: released(self._means.reactor, [lock_file(self.path)]))

    async def _substitute(self) -> None:
        """Try all places until one is right, those twice where a transfer broke.

        :raises GuixdError: none was.
        """
        self._tell(Event(SubstituterStarted(self.path).line))
        worst: GuixdError | None = None
        tried: set[str] = set()
        for sources in (self.offer.sources, None):
            if sources is None:  # the servers that were not asked before
                servers = await self._means.servers.of(self._options)
                sources = await self._means.narinfos.more(self.offer, servers)
            for server, place in self._places(sources):
                if place.url in tried:
                    continue
                await self._go_to(server)
                try:
                    await self._take_in(place)
                except GuixdError as error:
                    if not (isinstance(error, FetchError) and error.kind in _BROKEN):
                        tried.add(place.url)
                    self._warn(f"{place.name}: {error.text}")
                    if worst is None or isinstance(error, WrongHash):
                        worst = error
                else:
                    self._tell(Event(SubstituterSucceeded(self.path).line))
                    return
        raise worst or GuixdError(f"no place is known to have `{self.path}'")

    def _places(self, sources: Any) -> Iterator[tuple[str, Place]]:
        for source in sources:
            nearest = self._means.servers.nearest(source.server)
            for place in places(source, supported()):
                yield source.server, replace(place, nearest=max(place.nearest, nearest))

    async def _take_in(self, place: Place) -> None:
        """Make the item valid from PLACE.

        :raises GuixdError: that was not possible; nothing is left of it.
        """
        means, narinfo = self._means, self.offer.narinfo
        links = Links(means.store.directory.path) if self._options.deduplicate else None
        incoming = await self._when_free(
            lambda: Incoming(
                means.store,
                self.path,
                narinfo.algorithm,
                narinfo.nar_hash,
                narinfo.nar_size,
                links,
            )
        )
        try:
            transfer = Transfer(
                means.reactor,
                means.threads,
                means.fetcher,
                place,
                incoming,
                self._tell,
                self._progress,
            )
            await transfer.run()
            await self._commit(incoming)
        finally:
            await to_the_end(means.threads(incoming.discard))

    async def _when_free(self, step: Any) -> Any:
        while True:
            try:
                return step()
            except Busy:  # another process collects, or writes, at this moment
                await deferLater(self._means.reactor, BUSY_RETRY)

    # --- its end -------------------------------------------------------------------------

    def _expire(self, reason: str) -> None:
        self._expired = reason
        self._cancel()

    def _finish(self, outcome: Result | Failure) -> None:
        if isinstance(outcome, Result):
            self._result = outcome
        elif self._overtaken:
            self._tell(Event(SubstituterSucceeded(self.path).line))
            self._result = Result(Status.SUBSTITUTED)
        elif self._expired:
            text = f"substitution of `{self.path}' {self._expired}"
            self._tell(Event(SubstituterFailed(self.path, "timeout").line, text))
            self._result = Result(Status.TIMED_OUT, text)
        elif self.abandoned:
            self._result = Result(Status.MISC_FAILURE, "given up")
        else:
            self._result = self._failed(outcome)
        self.ended.callback(None)
        for attachment in list(self._attachments):
            attachment.result.callback(self._result)

    def _failed(self, failure: Failure) -> Result:
        error = failure.value
        assert error is not None
        if not isinstance(error, GuixdError | OSError | CancelledError):
            _log.failure("the substitution of {path} went wrong", failure, path=self.path)
        reason = result_of(error).text
        status = NOT_FOUND
        if isinstance(error, WrongHash):
            status = f"hash-mismatch {error.algorithm} {error.expected} {error.actual}"
            mismatch = HashMismatch(self.path, error.algorithm, error.expected, error.actual)
            self._tell(Event(mismatch.line))
        text = f"substitution of `{self.path}' failed: {reason}"
        self._tell(Event(SubstituterFailed(self.path, f"{status} {reason}").line, text))
        return Result(Status.MISC_FAILURE, text)
