"""What substitute servers offer: lookups for all clients, one cache (spec: substitutes §3 to §6).

A question that somebody has asked already is not asked again: answers are kept in memory
and in files, and who asks the same meanwhile waits for the same answer.  A server that
cannot be reached is left alone for a while.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from guixd.errors import BadNarinfo, FetchError
from guixd.formats import narinfo
from guixd.formats.narinfo import Narinfo
from guixd.formats.narinfocache import CacheEntry
from guixd.formats.path import StoreDirectory, StorePath
from guixd.formats.servers import is_web
from guixd.net.cachefiles import CacheFiles
from guixd.net.codecs import supported
from guixd.net.places import Source, with_places
from guixd.net.requests import Answer
from guixd.net.verdicts import Judge, Verdicts

_log = Logger()

TTL_FOUND = 36 * 3600
TTL_ABSENT = 120
TTL_ERROR = 60
"""Seconds for which an answer holds, if the server does not say."""
LONGEST_TTL = 7 * 24 * 3600
DOWN = 60.0
"""Seconds for which a server that could not be reached is left alone."""
MOST_DOWN = 1000
"""How many of those are remembered."""
TIDYING = 24 * 3600.0
"""Seconds until it is looked again whether old files are to be removed."""
MOST_KEPT = 48 << 20
"""Bytes of narinfos in memory, more or less."""
_COST = 512
_COST_OF_REFERENCE = 160
"""Bytes that an answer, and each reference in it, needs besides its text."""
AT_ONCE = 1000
"""How many items are asked for before others have their turn."""
_READ = 256
"""How many answers are read from files in one step of a thread."""

_LONG = 16 << 10
"""Bytes of an answer that takes too long to be read in the reactor's thread."""
MOST_WAITING = 64 << 20
"""Bytes of such answers that may wait; more come from nobody but who means harm."""

Tell = Callable[[str], object]
"""Gets a line for the user."""
Threads = Callable[..., Deferred[Any]]


class Lookups(Protocol):
    """Asks servers many questions at once."""

    def lookup(
        self, urls: Sequence[str], answered: Callable[[int, Answer], None]
    ) -> Awaitable[None]:
        """GET all URLS of one server; ANSWERED gets the index of each and its answer."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A substitute that may be used.

    :ivar narinfo: what is known of the item, all of it signed by an authorised key.
    :ivar sources: where it can be had, in the order of the servers.
    """

    narinfo: Narinfo
    sources: tuple[Source, ...]

    @property
    def download_size(self) -> int:
        """Bytes to transfer, 0 if unknown."""
        return self.sources[0].narinfo.download_size


@dataclass(frozen=True, slots=True)
class _Kept:
    expiry: float
    narinfo: Narinfo | None
    cost: int


_Key = tuple[str, StorePath]


class Narinfos:
    """The narinfos of all servers.

    :param threads: calls functions where they may block.
    :param directory: where answers are kept in files.
    :param judge: called in threads.
    :param wall: gives seconds since the epoch.
    """

    def __init__(
        self,
        clock: IReactorTime,
        threads: Threads,
        lookups: Lookups,
        store: StoreDirectory,
        directory: str,
        judge: Judge,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._threads = threads
        self._lookups = lookups
        self._store = store
        self._files = CacheFiles(directory)
        self._judge = judge
        self._wall = wall
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()  # which forgets its first one quickly
        self._cost = 0
        self._asked: dict[_Key, list[Deferred[Narinfo | None]]] = {}
        self._down: dict[str, tuple[float, str]] = {}
        self._tidy_from = 0.0
        self._waiting = 0
        """Bytes of answers that are to be read in threads."""

    async def find(
        self, paths: Collection[StorePath], servers: Sequence[str], tell: Tell = lambda line: None
    ) -> dict[StorePath, Offer]:
        """Return what can be had of PATHS from SERVERS, the first ones preferred (§5).

        Servers that do not answer are passed over.  What no server has in a form that can
        be used here is not to be had, whoever vouches for it.

        :param tell: gets a line for each of those, once.
        """
        offers: dict[StorePath, Offer] = {}
        asked = list(dict.fromkeys(paths))
        told: set[str] = set()

        def tell_once(line: str) -> None:
            if line not in told:
                told.add(line)
                tell(line)

        for start in range(0, len(asked), AT_ONCE):
            if start:  # Others have their turn, even if all the answers are here.
                await deferLater(self._clock, 0)
            offers |= await self._find(asked[start : start + AT_ONCE], servers, tell_once)
        return offers

    async def _find(
        self, left: Sequence[StorePath], servers: Sequence[str], tell: Tell
    ) -> dict[StorePath, Offer]:
        offers: dict[StorePath, Offer] = {}
        said: dict[StorePath, list[Source]] = {}
        vouched: dict[StorePath, list[Narinfo]] = {}
        for server in servers:
            if not left:
                break
            verdicts = Verdicts(self._threads, self._judge)
            answers = await self._ask(server, left, tell, verdicts.add)
            for path, found in answers.items():
                said.setdefault(path, []).append(Source(server, found))
            for path in await verdicts.all():
                vouched.setdefault(path, []).append(answers[path])
            for path in answers:
                for authorised in vouched.get(path, ()):
                    sources = _sources(authorised, said[path])
                    if sources:
                        offers.setdefault(path, Offer(authorised, sources))
            left = [path for path in left if path not in offers]
        return offers

    async def more(
        self, offer: Offer, servers: Sequence[str], tell: Tell = lambda line: None
    ) -> tuple[Source, ...]:
        """Return all places of OFFER, also from those of SERVERS that were not asked for it."""
        path = offer.narinfo.path
        said: list[Source] = []
        for server in servers:
            answers = await self._ask(server, [path], tell)
            if path in answers:
                said.append(Source(server, answers[path]))
        return _sources(offer.narinfo, said)

    # --- asking --------------------------------------------------------------------

    async def _ask(
        self,
        server: str,
        paths: Sequence[StorePath],
        tell: Tell,
        said: Callable[[StorePath, Narinfo], object] = lambda path, found: None,
    ) -> dict[StorePath, Narinfo]:
        """Return what SERVER says of PATHS, authorised or not.

        :param said: is told of each as soon as it is there.
        """
        now = self._wall()
        answers: dict[StorePath, Narinfo] = {}
        missing: list[StorePath] = []
        waiting: deque[tuple[StorePath, Deferred[Narinfo | None]]] = deque()
        for path in paths:
            key = server, path
            kept = self._kept.get(key)
            if kept is not None and kept.expiry > now:
                if kept.narinfo is not None:
                    answers[path] = kept.narinfo
                    said(path, kept.narinfo)
                continue
            waiters = self._asked.get(key)
            if waiters is None:
                waiters = self._asked[key] = []
                missing.append(path)
            waiter: Deferred[Narinfo | None] = Deferred(waiters.remove)
            waiters.append(waiter)
            waiting.append((path, waiter))
        if missing:
            # Others may wait for the same answers, so the asking goes on without us.
            asking = Deferred.fromCoroutine(self._obtain(server, missing))
            asking.addErrback(lambda failure: _log.failure("a lookup went wrong", failure))
        try:
            while waiting:
                path, waiter = waiting.popleft()
                found = await waiter
                if found is not None:
                    answers[path] = found
                    said(path, found)
        finally:
            for _, waiter in waiting:
                waiter.addErrback(lambda _: None)
                waiter.cancel()
        down = self._why_down(server)
        if down:
            tell(f"substitute server '{_host(server)}' is left alone for a while: {down}")
        return answers

    async def _obtain(self, server: str, paths: Sequence[StorePath]) -> None:
        left = dict.fromkeys(paths)
        try:
            for start in range(0, len(paths), _READ):
                part = paths[start : start + _READ]
                for path, (entry, known) in (await self._threads(self._load, server, part)).items():
                    self._settle(server, path, known, entry.expiry, len(entry.value or b""))
                    del left[path]
            if left and not self._why_down(server):
                await self._look_up(server, left)
        except FetchError as error:
            self._failed(server, error.text)
        finally:
            for path in left:
                self._fire(server, path, None)
        if self._clock.seconds() >= self._tidy_from:
            self._tidy_from = self._clock.seconds() + TIDYING
            await self._threads(self._files.tidy, int(self._wall()))

    def _load(
        self, server: str, paths: Sequence[StorePath]
    ) -> dict[StorePath, tuple[CacheEntry, Narinfo | None]]:
        """Return what files say of PATHS and still holds; blocks."""
        files = self._files.read(server, [path.hash_part for path in paths])
        now = self._wall()
        found = {}
        for path in paths:
            entry = files.get(path.hash_part)
            if entry is not None and entry.expiry > now >= entry.date - TTL_FOUND:
                known = self._read(server, entry.value, path)
                if known is not None or entry.value is None:
                    found[path] = entry, known
        return found

    async def _look_up(self, server: str, left: dict[StorePath, None]) -> None:
        """Ask SERVER for all that is LEFT, and take what it answers out of it."""
        paths = list(left)
        base = server.rstrip("/")
        to_keep: dict[str, CacheEntry] = {}
        reading: list[Deferred[None]] = []

        def take(path: StorePath, answer: Answer, found: Narinfo | None) -> None:
            del left[path]
            entry = self._judge_answer(server, path, answer, found)
            if entry is not None:
                to_keep[path.hash_part] = entry

        async def take_long(path: StorePath, answer: Answer) -> None:
            self._waiting += len(answer.body)
            try:
                found = await self._threads(self._read, server, answer.body, path)
            finally:
                self._waiting -= len(answer.body)
            take(path, answer, found)

        def answered(index: int, answer: Answer) -> None:
            path = paths[index]
            if not answer.status:
                self._failed(server, answer.body.decode("utf-8", "replace"))
                return
            if answer.status != 200:
                take(path, answer, None)
            elif len(answer.body) < _LONG:
                take(path, answer, self._read(server, answer.body, path))
            elif self._waiting < MOST_WAITING:
                reading.append(Deferred.fromCoroutine(take_long(path, answer)))

        self._down.pop(server, None)
        await self._lookups.lookup([f"{base}/{p.hash_part}.narinfo" for p in paths], answered)
        for each in reading:
            await each
        if to_keep and is_web(server):  # files are near enough
            await self._threads(self._files.write, server, to_keep)

    def _judge_answer(
        self, server: str, path: StorePath, answer: Answer, found: Narinfo | None
    ) -> CacheEntry | None:
        """Settle what is FOUND to be known of PATH now; return what can be kept in a file."""
        ttl = TTL_ERROR
        if answer.status in (200, 404, 202):
            ttl = TTL_FOUND if answer.status == 200 else TTL_ABSENT
            if answer.max_age is not None:
                ttl = min(max(answer.max_age, 0), LONGEST_TTL)
        body = answer.body if answer.status == 200 else None
        if found is None and body is not None:
            # Garbage, or about something else: not to be found by others who read our files.
            self._settle(server, path, None, self._wall() + min(ttl, TTL_ERROR), 0)
            return None
        now = int(self._wall())
        self._settle(server, path, found, now + ttl, len(body or b""))
        return CacheEntry(server, now, ttl, body)

    def _read(self, server: str, body: bytes | None, path: StorePath) -> Narinfo | None:
        """Return the narinfo BODY of SERVER if it is one and about PATH.

        It names no more downloads than those that can be used.
        """
        if body is None:
            return None
        try:
            found = narinfo.parse(body, self._store)
        except BadNarinfo:
            return None
        if found.path != path:
            return None
        return with_places(Source(server, found), supported())

    def _settle(
        self, server: str, path: StorePath, found: Narinfo | None, expiry: float, size: int
    ) -> None:
        key = server, path
        old = self._kept.pop(key, None)
        if old is not None:
            self._cost -= old.cost
        references = 0 if found is None else len(found.references)
        cost = size + _COST + _COST_OF_REFERENCE * references
        self._kept[key] = kept = _Kept(expiry, found, cost)
        self._cost += kept.cost
        while self._cost > MOST_KEPT:
            self._cost -= self._kept.popitem(last=False)[1].cost
        self._fire(server, path, found)

    def _fire(self, server: str, path: StorePath, found: Narinfo | None) -> None:
        for waiter in tuple(self._asked.pop((server, path), ())):
            waiter.callback(found)

    # --- servers that are not there ------------------------------------------------------

    def _failed(self, server: str, reason: str) -> None:
        if self._why_down(server):
            return
        _log.warn("substitute server {host}: {reason}", host=_host(server), reason=reason)
        if len(self._down) >= MOST_DOWN:
            del self._down[next(iter(self._down))]
        # Only by this name: others are not to suffer from what somebody calls it.
        self._down[server] = self._clock.seconds() + DOWN, reason

    def _why_down(self, server: str) -> str:
        until, reason = self._down.get(server, (0.0, ""))
        return reason if until > self._clock.seconds() else ""


def _sources(authorised: Narinfo, said: Sequence[Source]) -> tuple[Source, ...]:
    """Return who has what AUTHORISED is about, of those who SAID something of it."""
    return tuple(
        source
        for source in said
        if source.narinfo.downloads and source.narinfo.is_equivalent(authorised)
    )


def _host(server: str) -> str:
    try:
        return urlsplit(server).netloc.rpartition("@")[2] or server
    except ValueError:
        return server
