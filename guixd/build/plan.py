"""Which derivations a request needs built, found without recursion (build.md §3).

Only derivations with invalid wanted outputs are entered; their inputs follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from guixd.build.request import Roots, Wanted
from guixd.build.results import result_of
from guixd.build.scheduler import Priority
from guixd.build.threads import Threads
from guixd.build.turns import Turns
from guixd.errors import Busy, GuixdError
from guixd.formats.derivation import Derivation
from guixd.formats.path import StorePath
from guixd.store.local import LocalStore

BUSY_RETRY = 0.1
"""Seconds until what another process has for a moment is tried again."""


@dataclass(slots=True, eq=False)
class Goal:
    """A derivation to build.

    :ivar drv: `None` if the derivation itself is not there.
    :ivar missing: whether the derivation is not valid.
    :ivar error: why it cannot even be tried; empty if it can.
    :ivar pending: how many inputs are not built yet.
    :ivar failed: how many inputs could not be had.
    :ivar priority: what is smaller is built first; see `chains.rank`.
    """

    path: StorePath
    drv: Derivation | None
    missing: bool = False
    error: str = ""
    started: bool = False
    top: bool = False
    pending: int = 0
    failed: int = 0
    dependents: list[Goal] = field(default_factory=list)
    priority: Priority = ()

    @property
    def key(self) -> tuple[str, str]:
        """What goals are sorted by."""
        return (self.path.name, self.path)


class Planner:
    """Finds the goals of one request.

    :param roots: gets the derivations and outputs before they are looked at.
    :ivar goals: what is to be built.
    """

    def __init__(
        self, clock: IReactorTime, threads: Threads, store: LocalStore, roots: Roots
    ) -> None:
        self.goals: dict[StorePath, Goal] = {}
        self._clock = clock
        self._threads = threads
        self._store = store
        self._roots = roots
        self._protected: set[StorePath] = set()
        self._todo: list[Goal] = []

    async def plan(self, wanted: Iterable[Wanted]) -> None:
        """Fill `goals`.

        :raises GuixdError: the store cannot be read.
        """
        turns = Turns(self._clock)
        for want in wanted:
            if want.path.is_derivation:
                goal = await self._enter(want.path, want.outputs)
                if goal is not None:
                    goal.top = True
            else:
                # Nothing can provide it; that is no failure of the request.
                await self._protect(want.path)
            await turns.give()
        while self._todo:
            await self._expand(self._todo.pop())
            await turns.give()

    async def _protect(self, path: StorePath) -> None:
        while path not in self._protected:
            try:
                self._roots.add(path)
            except Busy:  # a collector reads our roots at this moment
                await deferLater(self._clock, BUSY_RETRY)
            else:
                self._protected.add(path)

    async def _enter(self, path: StorePath, outputs: Iterable[str] | None) -> Goal | None:
        """Return the goal that makes OUTPUTS (none named: all) valid, or None if they are."""
        goal = self.goals.get(path)
        if goal is not None:
            return goal
        await self._protect(path)
        if not self._store.database.is_valid(path):
            error = f"cannot build missing derivation `{path}'"
            goal = self.goals[path] = Goal(path, None, missing=True, error=error)
            return goal
        try:
            if self._store.takes_long_to_read(path):
                drv = await self._threads(self._store.load_derivation, path)
            else:
                drv = self._store.read_derivation(path)
        except (GuixdError, OSError) as failure:
            goal = self.goals[path] = Goal(path, None, error=result_of(failure).text)
            return goal
        names = set(outputs) if outputs else set(drv.outputs)
        for output in drv.outputs.values():
            await self._protect(output.path)
        if all(self._store.database.is_valid(o.path) for n, o in drv.outputs.items() if n in names):
            return None
        goal = self.goals[path] = Goal(path, drv)
        self._todo.append(goal)
        return goal

    async def _expand(self, goal: Goal) -> None:
        """Find what GOAL needs first."""
        if goal.drv is None:
            return
        for path, names in goal.drv.inputs.items():
            needed = await self._enter(path, names)
            if needed is not None:
                goal.pending += 1
                needed.dependents.append(goal)
            if needed is None:
                unknown = sorted(set(names) - set(self._store.derivation_outputs(path)))
            else:
                unknown = sorted(set(names) - set(needed.drv.outputs)) if needed.drv else []
            if unknown:
                goal.error = (
                    f"derivation `{goal.path}' uses the output `{unknown[0]}' of `{path}',"
                    " which has no such output"
                )
        for source in goal.drv.sources:
            if not self._store.database.is_valid(source):
                goal.failed += 1
