"""Which derivations a request needs built, found without recursion (spec: build §3).

Only derivations with invalid wanted outputs are entered; their inputs follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from twisted.internet.interfaces import IReactorTime

from guixd.build.available import Available
from guixd.build.contents import is_intact, read_derivation
from guixd.build.protection import Protection
from guixd.build.request import BuildMode, Roots, Wanted
from guixd.build.results import result_of
from guixd.build.scheduler import Priority
from guixd.build.threads import Threads
from guixd.build.turns import Turns
from guixd.errors import GuixdError
from guixd.formats.derivation import Derivation
from guixd.formats.path import StorePath
from guixd.net.narinfos import Offer
from guixd.store.local import LocalStore


@dataclass(slots=True, eq=False)
class Goal:
    """A derivation to build.

    :ivar drv: `None` if the derivation itself is not there.
    :ivar missing: whether the derivation is not valid.
    :ivar error: why it cannot even be tried; empty if it can.
    :ivar failed_before: whether that is since a failure is remembered.
    :ivar pending: how many inputs are not built yet.
    :ivar failed: how many inputs could not be had.
    :ivar culprit: what failed first of all that it needs.
    :ivar priority: what is smaller is built first; see `chains.rank`.
    :ivar offer: the substitute, if this is not a derivation to build but an item to download.
    :ivar named: whether the client asks for this very item, which is no output to be made.
    :ivar unfolds: whether there is more to plan when it is done.
    :ivar outdated: whether something that it refers to has been collected since it was offered.
    :ivar hopeful: whether there are substitutes that lack something now, but maybe not when
        the inputs are built.
    """

    path: StorePath
    drv: Derivation | None
    mode: BuildMode = BuildMode.NORMAL
    missing: bool = False
    error: str = ""
    failed_before: bool = False
    started: bool = False
    top: bool = False
    pending: int = 0
    failed: int = 0
    culprit: StorePath | None = None
    dependents: list[Goal] = field(default_factory=list)
    priority: Priority = ()
    offer: Offer | None = None
    named: bool = False
    unfolds: bool = False
    outdated: bool = False
    hopeful: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What goals are sorted by."""
        return (self.path.name, self.path)

    def is_same(self, other: Goal) -> bool:
        """Whether OTHER, of another plan, is the same work."""
        return self.path == other.path and (self.offer is None) == (other.offer is None)


class Planner:
    """Finds the goals of one request.

    :param roots: gets the derivations and outputs before they are looked at.
    :param mode: of what is asked for; what that needs is built as usual.
    :param failures: whether remembered failures count.
    :param available: what can be substituted.
    :param begun: outputs that are not downloaded even so, with the derivations that make them.
    :ivar goals: what is to be built.
    """

    def __init__(
        self,
        clock: IReactorTime,
        threads: Threads,
        store: LocalStore,
        roots: Roots,
        mode: BuildMode = BuildMode.NORMAL,
        *,
        failures: bool = False,
        available: Available | None = None,
        begun: Mapping[StorePath, StorePath] | None = None,
    ) -> None:
        self.goals: dict[StorePath, Goal] = {}
        self._clock = clock
        self._threads = threads
        self._store = store
        self._protection = Protection(clock, roots)
        self._mode = mode
        self._failures = failures
        self._available = available or Available()
        self._begun = begun or {}
        self._intact: dict[StorePath, bool] = {}
        self._todo: list[Goal] = []

    async def plan(self, wanted: Iterable[Wanted]) -> None:
        """Fill `goals`.

        :raises GuixdError: the store cannot be read.
        """
        turns = Turns(self._clock)
        for want in wanted:
            if want.is_build:
                goals = await self._needed(want.path, want.outputs, self._mode)
                for goal in goals:
                    goal.top = True
                if not goals and self._mode is BuildMode.REPAIR:
                    await self._enter_broken(want.path)
            else:
                # If nothing can provide it, that is no failure of the request.
                await self._protection.add(want.path)
                if not self._store.database.is_valid(want.path):
                    offered = await self._offered([want.path])
                    for goal in offered:
                        goal.top = goal.named = True
            await turns.give()
        while self._todo:
            await self._expand(self._todo.pop())
            await turns.give()
        for goal in self.goals.values():
            # What is downloaded of its outputs for others need not be made.
            if goal.drv is not None and not goal.error and goal.mode is BuildMode.NORMAL:
                outputs = goal.drv.output_paths
                _wait_for(goal, [self.goals[path] for path in outputs if path in self.goals])
            await turns.give()

    async def _needed(
        self, path: StorePath, outputs: Iterable[str] | None, mode: BuildMode
    ) -> list[Goal]:
        """Return the goals that make OUTPUTS (none named: all) of the derivation PATH valid."""
        substitute = mode is BuildMode.NORMAL and self._available.offers
        if substitute and path not in self.goals:
            database = self._store.database
            await self._protection.add(path)
            known = self._store.derivation_outputs(path) if database.is_valid(path) else {}
            for output in known.values():
                await self._protection.add(output)
            names = set(outputs or ()) or set(known)
            wanted = [output for name, output in known.items() if name in names]
            missing = [output for output in wanted if not database.is_valid(output)]
            if missing and self._available.offers.keys() >= set(missing):
                return await self._offered(missing)
        goal = await self._enter(path, outputs, mode)
        return [] if goal is None else [goal]

    async def _offered(self, paths: Iterable[StorePath]) -> list[Goal]:
        """Return the goals that substitute those of PATHS that are available, or make them."""
        found = []
        for path in paths:
            goal = self.goals.get(path)
            offer = self._available.offers.get(path)
            if path in self._begun:
                goal = await self._enter(self._begun[path], None)
            elif goal is None and offer is not None:
                goal = self.goals[path] = Goal(path, None, offer=offer)
                self._todo.append(goal)
            if goal is not None:
                found.append(goal)
        return found

    async def _enter(
        self,
        path: StorePath,
        outputs: Iterable[str] | None,
        mode: BuildMode = BuildMode.NORMAL,
    ) -> Goal | None:
        """Return the goal that makes OUTPUTS (none named: all) valid, or None if they are."""
        goal = self.goals.get(path)
        if goal is not None:
            return goal
        await self._protection.add(path)
        if not self._store.database.is_valid(path):
            for offered in await self._offered([path]):
                offered.unfolds = True
                return offered
            error = f"cannot build missing derivation `{path}'"
            goal = self.goals[path] = Goal(path, None, missing=True, error=error)
            return goal
        known = self._store.derivation_outputs(path)
        names = set(outputs or known)
        wanted = [output for name, output in known.items() if name in names]
        for output in known.values():
            await self._protection.add(output)
        # What the derivation says need not be known if nothing is to be done.
        if not wanted or await self._is_done(wanted, mode):
            return None
        try:
            drv = await read_derivation(self._threads, self._store, path)
        except (GuixdError, OSError) as failure:
            goal = self.goals[path] = Goal(path, None, error=result_of(failure).text)
            return goal
        goal = self.goals[path] = Goal(path, drv, mode=mode)
        self._refuse_early(goal, drv, wanted)
        if not goal.error:
            self._todo.append(goal)
        return goal

    async def _is_done(self, wanted: Iterable[StorePath], mode: BuildMode) -> bool:
        """Whether outputs need not be built in MODE."""
        if mode is BuildMode.CHECK:
            return False
        for path in wanted:
            if not self._store.database.is_valid(path):
                return False
            if mode is BuildMode.REPAIR and not await self._is_intact(path):
                return False
        return True

    async def _is_intact(self, path: StorePath) -> bool:
        """Whether the valid item PATH has the contents that were registered."""
        if path not in self._intact:
            expected = self._store.database.path_info(path).nar_hash
            self._intact[path] = await is_intact(self._threads, path, expected)
        return self._intact[path]

    def _refuse_early(self, goal: Goal, drv: Derivation, wanted: Iterable[StorePath]) -> None:
        """Find out whether GOAL is not worth trying."""
        database = self._store.database
        if goal.mode is BuildMode.CHECK:
            missing = sorted(path for path in drv.output_paths if not database.is_valid(path))
            if missing:
                goal.error = (
                    f"cannot check `{goal.path}': its output `{missing[0]}' is not there;"
                    " build it normally before"
                )
        elif goal.mode is BuildMode.NORMAL and self._failures:
            invalid = (path for path in wanted if not database.is_valid(path))
            goal.failed_before = any(map(database.has_failed, invalid))
            if goal.failed_before:
                goal.error = failed_before(goal.path)

    async def _enter_broken(self, path: StorePath) -> None:
        """Enter goals that repair what the outputs of the derivation PATH need."""
        database = self._store.database
        outputs = database.derivation_outputs(path).values()
        makers: dict[StorePath, tuple[StorePath, str]] = {}
        for drv in sorted(database.closure([path])):
            if drv.is_derivation:
                for name, output in database.derivation_outputs(drv).items():
                    makers[output] = (drv, name)
        valid = [output for output in outputs if database.is_valid(output)]
        for item in sorted(database.closure(valid)):
            if await self._is_intact(item):
                continue
            goal = None
            if item in makers:
                drv, name = makers[item]
                goal = await self._enter(drv, [name], BuildMode.REPAIR)
            if goal is None:
                error = f"cannot repair `{item}': nothing is known that makes it"
                goal = self.goals[path] = Goal(path, None, error=error)
            goal.top = True

    async def _expand(self, goal: Goal) -> None:
        """Find what GOAL needs first."""
        if goal.offer is not None:
            await self._protection.add(goal.path)
            for reference in sorted(goal.offer.narinfo.references - {goal.path}):
                await self._protection.add(reference)
                if not self._store.database.is_valid(reference):
                    offered = await self._offered([reference])
                    _wait_for(goal, offered)
                    goal.outdated |= not offered
        if goal.drv is None:
            return
        for path, names in goal.drv.inputs.items():
            repair = goal.mode is BuildMode.REPAIR
            mode = BuildMode.REPAIR if repair else BuildMode.NORMAL
            needed = await self._needed(path, names, mode)
            _wait_for(goal, needed)
            building = next((each for each in needed if each.offer is None), None)
            if any(each.unfolds for each in needed):
                unknown = []
            elif building is None:
                unknown = sorted(set(names) - set(self._store.derivation_outputs(path)))
            else:
                unknown = sorted(set(names) - set(building.drv.outputs)) if building.drv else []
            if unknown:
                goal.error = (
                    f"derivation `{goal.path}' uses the output `{unknown[0]}' of `{path}',"
                    " which has no such output"
                )
        for source in goal.drv.sources:
            if not self._store.database.is_valid(source):
                offered = await self._offered([source])
                _wait_for(goal, offered)
                if not offered:
                    goal.failed += 1
                    goal.culprit = goal.culprit or source
        incomplete = self._available.incomplete
        if incomplete and goal.pending and goal.mode is BuildMode.NORMAL:
            goal.hopeful = not incomplete.isdisjoint(goal.drv.output_paths)


def _wait_for(goal: Goal, needed: Iterable[Goal]) -> None:
    for each in needed:
        goal.pending += 1
        each.dependents.append(goal)


def failed_before(path: StorePath) -> str:
    """Return what to tell of the derivation PATH, whose failure is remembered."""
    return (
        f"building `{path}' failed before, which is remembered;"
        f" `guix gc --clear-failures {path}' forgets it"
    )
