"""Substitutes for all clients: what there is, and who takes part in which download."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from twisted.internet.defer import Deferred, DeferredList

from guixd.build.broadcast import Observer
from guixd.build.claims import Claims
from guixd.build.keywarnings import KeyWarnings
from guixd.build.lanes import Lanes
from guixd.build.request import ClientOptions, Level
from guixd.build.results import Result
from guixd.build.scheduler import Priority
from guixd.build.servers import Servers
from guixd.build.substitution import Attachment, Means, Substitution
from guixd.build.threads import Threads
from guixd.formats.path import StorePath
from guixd.net.narinfos import Narinfos, Offer
from guixd.net.receiving import FetcherLike
from guixd.store.local import LocalStore


class Substitutes:
    """The substitutes of one store.

    :param claims: shared with what builds, so that no path is made twice.
    :ivar claims: the same.
    """

    def __init__(
        self,
        reactor: Any,
        threads: Threads,
        store: LocalStore,
        claims: Claims,
        narinfos: Narinfos,
        servers: Servers,
        fetcher: FetcherLike,
        warnings: KeyWarnings,
        lanes: Lanes | None = None,
    ) -> None:
        self.claims = claims
        self._narinfos = narinfos
        self._warnings = warnings
        self._means = Means(
            reactor, threads, store, claims, lanes or Lanes(), narinfos, servers, fetcher
        )
        self._running: dict[StorePath, list[Substitution]] = {}
        self._ending: set[Substitution] = set()

    async def find(
        self, paths: Collection[StorePath], options: ClientOptions, observer: Observer
    ) -> dict[StorePath, Offer]:
        """Return what there is of PATHS for a client, nothing if it wants no substitutes."""
        if not options.may_substitute or not paths:
            return {}
        servers = await self._means.servers.of(options)
        if servers:
            await self._warnings.tell(observer)
        return await self._narinfos.find(
            paths, servers, lambda line: observer.log(Level.ERROR, line)
        )

    def attach(
        self, offer: Offer, options: ClientOptions, priority: Priority, observer: Observer
    ) -> tuple[Substitution, Attachment]:
        """Let a client take part in the substitution of OFFER, which begins if it does not run."""
        # Whoever names other servers, maybe slow ones, keeps nobody else waiting.
        for running in self._running.get(offer.narinfo.path, ()):
            if running.offer.sources == offer.sources and not running.abandoned:
                return running, running.attach(observer, options)
        substitution = Substitution(self._means, offer, options, priority)
        self._running.setdefault(substitution.path, []).append(substitution)
        return self._begin(substitution, observer, options)

    def _begin(
        self, substitution: Substitution, observer: Observer, options: ClientOptions
    ) -> tuple[Substitution, Attachment]:
        self._ending.add(substitution)
        attachment = substitution.attach(observer, options)
        substitution.ended.addCallback(lambda _: self._forget(substitution))
        substitution.start()
        return substitution, attachment

    def _forget(self, substitution: Substitution) -> None:
        self._ending.discard(substitution)
        path = substitution.path
        running = self._running.get(path, [])
        if substitution in running:
            running.remove(substitution)
        if not running:
            self._running.pop(path, None)
        elif self._means.store.database.is_valid(path):
            for other in tuple(running):
                other.overtake()

    async def repair(self, offer: Offer, options: ClientOptions, observer: Observer) -> Result:
        """Replace what is at a path, valid or not, by what OFFER has (spec: build §6).

        It is protected, as is what it refers to, which is valid.

        :return: of status `SUBSTITUTED`, or why that was not possible.
        """
        substitution, attachment = self._begin(
            Substitution(self._means, offer, options, (), repair=True), observer, options
        )
        try:
            return await attachment.result
        finally:
            substitution.detach(attachment)

    def stop(self) -> Deferred[None]:
        """Give all downloads up; the Deferred fires when nothing of them is left."""
        waiting: list[Deferred[None]] = []
        for substitution in list(self._ending):
            ended: Deferred[None] = Deferred()
            substitution.ended.addCallback(_firing(ended))
            waiting.append(ended)
            substitution.give_up()
        return DeferredList(waiting).addCallback(lambda _: None)


def _firing(ended: Deferred[None]) -> Callable[[None], None]:
    return ended.callback
