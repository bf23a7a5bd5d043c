"""The builder of derivations for all clients (spec: build §1 to §4)."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from guixd.build import substitution
from guixd.build.available import Available, Search
from guixd.build.boxes import Boxes
from guixd.build.broadcast import Observer
from guixd.build.builder import Launcher
from guixd.build.builtins import Builtins
from guixd.build.cgroups import Cgroups, Unavailable, own_place
from guixd.build.chains import rank
from guixd.build.claims import Claims
from guixd.build.container import Host, root_directory
from guixd.build.contents import is_intact
from guixd.build.diskspace import DiskSpace
from guixd.build.downloadtools import DownloadTools
from guixd.build.durations import Durations
from guixd.build.goals import Past, RequestRun
from guixd.build.plan import Goal, Planner
from guixd.build.protection import Protection
from guixd.build.request import BuildMode, BuildRequest, Roots, Wanted
from guixd.build.scheduler import Scheduler, Share
from guixd.build.shared import Attachment, Common, SharedBuild
from guixd.build.substitutes import Substitutes
from guixd.build.substitution import Substitution
from guixd.build.threads import Threads
from guixd.build.turns import Turns
from guixd.build.users import BuildUserPool, pool_of
from guixd.build.workshop import Workshop
from guixd.errors import BuildError
from guixd.formats.path import StorePath
from guixd.interfaces import IBuilder
from guixd.net.reach import Reach
from guixd.net.receiving import FetcherLike
from guixd.settings import BuildLimits, Settings
from guixd.store.local import LocalStore

_log = Logger()


@implementer(IBuilder)
class Engine:
    """Builds for every client of one store, sharing what several of them want.

    :param threads: where blocking steps run, see `threads.pool_threads`.
    :param launcher: an `interfaces.ILauncher`.
    :param fetcher: an `interfaces.IFetcher`; without it nothing is downloaded.
    :param substitutes: what need not be built; without it everything is.
    :param users: who builders run as; by default what SETTINGS say.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        settings: Settings,
        store: LocalStore,
        launcher: Launcher,
        threads: Threads,
        users: BuildUserPool | None = None,
        *,
        fetcher: FetcherLike | None = None,
        substitutes: Substitutes | None = None,
    ) -> None:
        self._users = users or pool_of(settings, reactor)
        os.makedirs(root_directory(settings), exist_ok=True)
        builtins, host = None, Host.current()
        if fetcher is not None:
            is_valid = store.database.is_valid
            nearest = Reach.WORLD if settings.refuse_private_hosts else Reach.LOOPBACK
            boxes = Boxes(launcher, self._users, threads, settings.directories.temporary, host)
            tools = DownloadTools(
                reactor, threads, fetcher, store.directory, is_valid, nearest, boxes
            )
            builtins = Builtins(reactor, tools)
        self._workshop = Workshop(
            reactor,
            threads,
            settings,
            store,
            launcher,
            self._users,
            host,
            builtins,
            _cgroups_of(settings.build_limits),
        )
        self._scheduler = Scheduler(self._limit)
        self._durations = Durations(
            reactor, threads, settings.directories.state + "/build-durations"
        )
        self._durations.load()
        self._substitutes = substitutes
        self._claims = Claims() if substitutes is None else substitutes.claims
        places = (settings.directories.store, settings.directories.temporary)
        disk = DiskSpace(reactor, places, settings.min_free_disk)
        self._common = Common(self._workshop, self._scheduler, self._claims, self._durations, disk)
        self._builds: dict[StorePath, SharedBuild] = {}
        self._ending: set[SharedBuild] = set()
        self._requests: set[Deferred[None]] = set()
        self._runs: set[RequestRun] = set()

    def _limit(self) -> int | None:
        return self._users.size if self._users is not None else None

    def build(self, request: BuildRequest, observer: Observer) -> Deferred[None]:
        """Make what REQUEST wants valid, telling OBSERVER.

        Items that are no derivations and not valid are passed over.

        :return: a Deferred that fails with `BuildError`, or another `GuixdError`;
            cancelling it takes the client's interest away.
        """
        return self._track(Deferred.fromCoroutine(self._build(request, observer)))

    async def _build(self, request: BuildRequest, observer: Observer) -> None:
        shop = self._workshop
        own = shop.store.temp_roots() if request.roots is None else None
        roots: Any = request.roots or own
        try:
            if request.mode is BuildMode.REPAIR:
                request = await self._repair_by_substitutes(request, observer, roots)
            await self._carry_out(request, observer, roots)
        finally:
            if own is not None:
                own.close()

    async def _carry_out(self, request: BuildRequest, observer: Observer, roots: Roots) -> None:
        share = self._scheduler.share(request.options.max_jobs, client=request.options.client_uid)
        plan = partial(self._plan, request, observer, roots)
        run = RequestRun(self._workshop.reactor, self, plan, request, observer, share)
        self._runs.add(run)
        try:
            await run.run()
        finally:
            self._runs.discard(run)

    async def _plan(
        self, request: BuildRequest, observer: Observer, roots: Roots, past: Past
    ) -> dict[StorePath, Goal]:
        """Return the goals of REQUEST that are left to do, after what is PAST."""
        shop, options = self._workshop, request.options
        available = Available()
        if request.mode is BuildMode.NORMAL and self._substitutes and options.use_substitutes:
            but = past.given_up
            search = Search(
                shop.reactor, shop.threads, shop.store, self._substitutes, options, observer, but
            )
            available = await search.run(request.wanted)
        planner = Planner(
            shop.reactor,
            shop.threads,
            shop.store,
            roots,
            request.mode,
            failures=(options.settings or shop.settings).cache_failures,
            available=available,
            begun=past.begun,
        )
        await planner.plan(request.wanted)
        goals = planner.goals.values()
        await self._rank(goals)
        for goal in goals:
            if goal.offer is not None:
                # What has the most below it comes first, and of that the largest.
                size = goal.offer.download_size or goal.offer.narinfo.nar_size
                goal.priority = (-available.depths[goal.path], -size)
        return planner.goals

    async def _repair_by_substitutes(
        self, request: BuildRequest, observer: Observer, roots: Roots
    ) -> BuildRequest:
        """Replace what is damaged by substitutes; return what is left of REQUEST.

        :raises BuildError: an item that cannot be built cannot be replaced.
        """
        shop, database = self._workshop, self._workshop.store.database
        protection = Protection(shop.reactor, roots)
        left = []
        for want in request.wanted:
            paths = [want.path]
            if want.is_build:
                left.append(want)
                known = (
                    database.derivation_outputs(want.path) if database.is_valid(want.path) else {}
                )
                paths = [p for n, p in known.items() if not want.outputs or n in want.outputs]
            for path in paths:
                await protection.add(path)
                info = database.find_path_info(path)
                if info is not None and await is_intact(shop.threads, path, info.nar_hash):
                    continue
                problem = await self._replace(path, request, observer, roots)
                if problem and not want.is_build:
                    raise BuildError(f"cannot repair path `{path}': {problem}")
        return replace(request, wanted=tuple(left))

    async def _replace(
        self, path: StorePath, request: BuildRequest, observer: Observer, roots: Roots
    ) -> str:
        """Replace what is at PATH by a substitute, after what that refers to.

        :return: why that was not possible; empty if it was.
        """
        substitutes, options = self._substitutes, request.options
        if substitutes is None or not options.use_substitutes:
            return "there are no substitutes"
        offer = (await substitutes.find([path], options, observer)).get(path)
        if offer is None:
            return f"there is no substitute for `{path}'"
        references = tuple(offer.narinfo.references - {path})
        wanted = tuple(Wanted(reference, itself=True) for reference in references)
        try:
            # Those that are there already are protected, and that is all.
            need = replace(request, wanted=wanted, mode=BuildMode.NORMAL)
            await self._carry_out(need, observer, roots)
        except BuildError as error:
            return error.text
        if self._workshop.store.database.valid_paths(references) != set(references):
            return f"something that the substitute for `{path}' refers to is not valid"
        result = await substitutes.repair(offer, options, observer)
        return "" if result.status.succeeded else result.text

    def substitute(
        self, goal: Goal, request: RequestRun, observer: Observer
    ) -> tuple[Substitution, substitution.Attachment]:
        """Let REQUEST take part in the download of what GOAL offers."""
        assert goal.offer is not None
        assert self._substitutes is not None
        options = request.request.options
        return self._substitutes.attach(goal.offer, options, goal.priority, observer)

    async def _rank(self, goals: Collection[Goal]) -> None:
        turns = Turns(self._workshop.reactor)
        for _ in rank(goals, self._durations.of):
            await turns.give()

    def _track(self, running: Deferred[None]) -> Deferred[None]:
        self._requests.add(running)

        def done(result: Failure | None) -> Failure | None:
            self._requests.discard(running)
            return result

        return running.addBoth(done)

    # --- shared builds ------------------------------------------------------------

    def attach(
        self, goal: Goal, request: RequestRun, observer: Observer, share: Share
    ) -> tuple[SharedBuild, Attachment]:
        """Let REQUEST take part in the build of GOAL, which begins now if it does not run."""
        options = request.request.options
        normal = goal.mode is BuildMode.NORMAL
        running = self._builds.get(goal.path)
        if normal and running and running.is_open and running.rounds == options.rounds:
            return running, running.attach(observer, options, share, goal.priority, request.changed)
        assert goal.drv is not None
        build = SharedBuild(self._common, goal.path, goal.drv, options, goal.mode)
        if normal and (running is None or not running.is_open):
            self._builds[goal.path] = build
        self._ending.add(build)
        attachment = build.attach(observer, options, share, goal.priority, request.changed)
        build.ended.addCallback(self._forget, build)
        build.start()
        return build, attachment

    def _forget(self, _: None, build: SharedBuild) -> None:
        self._ending.discard(build)
        if self._builds.get(build.path) is build:
            del self._builds[build.path]

    def freed(self) -> None:
        """See whether builds that wait for disk can begin, as something was removed."""
        self._common.disk.changed()

    def close(self) -> None:
        """Begin no more builds; requests fail when all that is left to do is to begin some."""
        self._scheduler.close()
        self._common.disk.wake()
        for run in tuple(self._runs):
            run.changed()

    def stop(self) -> Deferred[None]:
        """Give all builds up; the Deferred fires when nothing of them is left."""
        for running in list(self._requests):
            running.cancel()
        # Not the builds' own Deferreds: others wait on them, too.
        waiting = [self._when_ended(build) for build in self._ending]
        if self._substitutes is not None:
            waiting.append(self._substitutes.stop())
        ended = DeferredList(waiting)
        self._durations.stop()

        def stopped(_: object) -> None:
            if self._users is not None:
                self._users.stop()

        return ended.addCallback(stopped)

    @staticmethod
    def _when_ended(build: SharedBuild) -> Deferred[None]:
        waiter: Deferred[None] = Deferred()
        build.ended.addCallback(lambda _: waiter.callback(None))
        return waiter


def _cgroups_of(limits: BuildLimits) -> Cgroups | None:
    """Return where builds get their control groups, if LIMITS ask for that and it is possible."""
    if limits == BuildLimits():
        return None
    try:
        return Cgroups(limits, own_place())
    except (OSError, Unavailable) as error:
        _log.error("builds have no limits of memory, processes or weight: {why}", why=str(error))
        return None
