"""What all sessions share: the store, and what builds and downloads (spec: options §2, §5)."""

from __future__ import annotations

import grp
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, succeed
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from guixd.build.broadcast import Observer
from guixd.build.request import BuildRequest, Level
from guixd.build.threads import Threads, to_the_end
from guixd.errors import Busy, GuixdError, StoreError
from guixd.formats.path import StorePath
from guixd.net.receiving import FetcherLike
from guixd.service.clientlog import ClientLog
from guixd.service.connection import Connection, Reactor
from guixd.service.contract import Builder
from guixd.service.drain import Drain
from guixd.service.supply import make_substitutes
from guixd.settings import Settings
from guixd.signatures.acl import Acl
from guixd.store import recovery
from guixd.store.items import PathInfo
from guixd.store.local import LocalStore
from guixd.store.verify import Verification

if TYPE_CHECKING:
    from guixd.build.substitutes import Substitutes
    from guixd.net.spawning import StartedFetcher

_log = Logger()

STOPPING = "the build daemon is stopping"
SWEEPS = 2
"""How many threads look at the whole store for all clients; others need some, too."""
STORE_RETRY = 0.2
"""Seconds until a store that another process has for itself is tried again."""

BuilderFactory: TypeAlias = Callable[["Daemon", LocalStore], Builder]
"""Makes the `IBuilder` of a daemon, when the first build is asked for."""


class Member(Protocol):
    """What is needed of a session."""

    connection: Connection
    log: ClientLog


class Daemon:
    """The store and what builds in it; both begin when they are first needed.

    :ivar uid: who the daemon runs as.
    :ivar encoded_infos: what is known of paths, and the replies that say so.
    :ivar acl: whose archives are taken.
    :ivar held_locks: paths that whoever started the daemon has locked for it.
    :ivar sessions: those of all clients that are connected.
    :ivar sweeps: for the threads that look at the whole store; see `sweep`.
    """

    def __init__(
        self,
        reactor: Reactor,
        settings: Settings,
        threads: Threads,
        builder: BuilderFactory,
        environ: Mapping[str, str],
        ahead: StartedFetcher | None = None,
    ) -> None:
        self.reactor = reactor
        self.settings = settings
        self.threads = threads
        self.uid = os.getuid()
        self.acl = Acl(settings.directories.configuration)
        self.held_locks = frozenset(environ.get("NIX_HELD_LOCKS", "").split())
        self._make_builder = builder
        self._environ = environ
        self._ahead = ahead
        self._fetcher: FetcherLike | None = None
        self._substitutes: Substitutes | None = None
        self._builder: Builder | None = None
        self._store: LocalStore | None = None
        self.encoded_infos: dict[StorePath, tuple[PathInfo, bytes]] = {}
        self._reserving = True
        self._tidying = False
        self._recovery: Deferred[None] = succeed(None)
        self._drain: Drain | None = None
        self.sessions: set[Member] = set()
        self.sweeps = DeferredSemaphore(SWEEPS)

    def open_store(self, reserve_space: bool) -> LocalStore:
        """Return the store, opened if it is not; a failure is not for ever.

        :param reserve_space: whether to keep the file that reserves disk space.
        """
        store = self._store
        if store is None:
            settings = self.settings
            store = LocalStore(
                settings.directories,
                build_gid=build_gid(settings) if self.uid == 0 else None,
                reserve=reserve_space,
                ignore_symlinks=settings.ignore_symlink_store,
                durable=settings.durable,
            )
            store.open()
            self._store = store
            if recovery.is_needed(store):
                self._recovery = Deferred.fromCoroutine(self._recover(store))
                self._recovery.addErrback(_ignore_cancelling)
        elif reserve_space is not self._reserving:
            store.reserve_space(reserve_space)
        self._reserving = reserve_space
        if recovery.is_needed(store):
            raise Busy("checking what was added before the machine stopped")
        return store

    async def _recover(self, store: LocalStore) -> None:
        """Make sure that what is valid in STORE is there."""
        try:
            reading = Verification(store.directory.path)
            finding = self.threads(recovery.find_damaged, store, reading)
            damaged = await to_the_end(finding, reading.stop)
            while True:
                try:
                    dropped = recovery.drop_damaged(store, damaged)
                    break
                except Busy:
                    await deferLater(self.reactor, STORE_RETRY)
        except GuixdError:
            _log.failure("cannot check what was added before the machine stopped")
            self._store = None  # the next client lets it begin anew
            store.close()
            return
        _log.warn(
            "the machine has stopped while the store was in use: {count} items were lost",
            count=len(dropped),
        )
        for path in dropped:
            _log.warn("{path} is not valid any more", path=path)

    def build(self, request: BuildRequest, observer: Observer) -> Deferred[None]:
        """Carry out REQUEST for OBSERVER; while the store is open."""
        if self._builder is None:
            assert self._store is not None
            self._builder = self._make_builder(self, self._store)
            if self._drain is not None:
                self._builder.close()
        return self._builder.build(request, observer)

    def tidy(self) -> None:
        """Do what may be due after a request: copy the log of the database, or stop."""
        if self._drain is not None:
            self._drain.stirred()
        if self._builder is not None:
            self._builder.freed()
        store = self._store
        if self._tidying or store is None or not store.database.checkpoint_due():
            return
        self._tidying = True

        def done(result: object) -> None:
            self._tidying = False
            if isinstance(result, Failure):
                _log.failure("cannot copy the log of the database", result)

        self.threads(store.database.checkpoint()).addBoth(done)

    @property
    def fetcher(self) -> FetcherLike:
        """What downloads for all; its process starts at the first need."""
        if self._fetcher is None:
            # Not needed to answer the first greeting.
            from guixd.net.client import Fetcher

            self._fetcher = Fetcher(self.reactor, self._environ, self._ahead)
        return self._fetcher

    def expect_downloads(self) -> None:
        """Start what downloads soon, so that the first question to a server need not wait."""
        if self._fetcher is None:
            self.reactor.callLater(0, self._start_fetcher)

    def _start_fetcher(self) -> None:
        if self._fetcher is not None or self._drain is not None:
            return
        try:
            self.fetcher.start()
        except OSError:
            _log.failure("cannot start the process that downloads")

    @property
    def substitutes(self) -> Substitutes:
        """What servers have, for all clients; while the store is open."""
        if self._substitutes is None:
            assert self._store is not None
            self._substitutes = make_substitutes(
                self.reactor,
                self.threads,
                self.settings,
                self._store,
                self.fetcher,
                self.acl,
                self._environ,
            )
        return self._substitutes

    async def drain(self) -> None:
        """Begin nothing more, and let what is at work go on for as long as the settings say."""
        seconds = self.settings.stop_timeout
        self._drain = Drain(self.reactor, seconds, lambda: any(self._working()))
        if self._builder is not None:
            self._builder.close()
        if not self._drain.over.called:
            for session in self._working():
                session.log.log(Level.ERROR, f"{STOPPING}; what runs has {seconds} s to finish")
        await self._drain.over
        if self._drain.given_up:
            for session in self._working():
                session.log.log(Level.ERROR, f"{STOPPING}, and gives up what still runs")
                session.connection.give_up()
            await deferLater(self.reactor, 0)  # so that clients are told before they are left

    def _working(self) -> list[Member]:
        return [session for session in self.sessions if session.log.working]

    def hurry(self) -> None:
        """Wait no longer for what is at work."""
        if self._drain is not None:
            self._drain.hurry()

    async def stop_builds(self) -> None:
        """End all builds and downloads, and what goes on without a client."""
        self._recovery.cancel()
        builder, self._builder = self._builder, None
        fetcher, self._fetcher = self._fetcher, None
        try:
            if builder is not None:
                await builder.stop()
        finally:
            if fetcher is not None:
                await fetcher.stop()

    def close_store(self) -> None:
        """Close the store, which nobody may use any more."""
        store, self._store = self._store, None
        if store is not None:
            store.close()


def _ignore_cancelling(failure: Failure) -> None:
    failure.trap(CancelledError)  # type: ignore[no-untyped-call]


def build_gid(settings: Settings) -> int | None:
    """Return the group of the build users.

    :raises StoreError: there is no such group.
    """
    if settings.build_uids is not None:
        return settings.build_uids.gid
    if settings.build_users_group is None:
        return None
    try:
        return grp.getgrnam(settings.build_users_group).gr_gid
    except KeyError:
        raise StoreError(
            f"the group '{settings.build_users_group}' specified in 'build-users-group'"
            " does not exist"
        ) from None
