"""Carrying out one request: its goals in order, and the error that ends it (spec: build §2, §3).

The goals are planned anew, while others go on, whenever more is known than before: what is
offered cannot be had, a derivation has come that nobody could read before, or a derivation
with a substitute that lacked something has all that it is built from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from guixd.build import substitution
from guixd.build.broadcast import Observer
from guixd.build.plan import Goal
from guixd.build.request import BuildRequest, Level
from guixd.build.results import Result, Status
from guixd.build.scheduler import Share
from guixd.build.shared import Attachment, SharedBuild
from guixd.build.substitution import Substitution
from guixd.build.turns import Turns
from guixd.errors import BuildError
from guixd.formats.path import StorePath
from guixd.formats.trace import BuildFailed, BuildFailedBefore

NO_SLOTS = (
    "unable to start any build: `--max-jobs' is 0 and none can be offloaded;"
    " with `--max-jobs=1' it is done here"
)
STOPPING = "the build daemon is stopping and begins no more builds; try again when it is back"
REST = 3
"""How many times as long as a plan has taken, none is begun after it."""
LONGEST_REST = 1.0
"""Seconds after which another is begun in any case."""
CIRCLE = "derivations depend on each other in a circle"


class Running(Protocol):
    """A build, or a download, that clients take part in."""

    path: StorePath

    @property
    def stuck(self) -> bool:
        """Whether it waits for a slot that none of its clients can ever get."""

    def detach(self, attachment: Any) -> None:
        """Let a client go."""


class Builds(Protocol):
    """Gives the running or a new build of a derivation; the engine."""

    def substitute(
        self, goal: Goal, request: RequestRun, observer: Observer
    ) -> tuple[Substitution, substitution.Attachment]:
        """Let REQUEST take part in the download of what GOAL offers."""

    def attach(
        self, goal: Goal, request: RequestRun, observer: Observer, share: Share
    ) -> tuple[SharedBuild, Attachment]:
        """Let REQUEST take part in the build of GOAL."""


@dataclass(frozen=True, slots=True)
class Past:
    """What has come out so far, and counts for a new plan.

    :ivar given_up: what could not be substituted although it was offered.
    :ivar begun: the outputs of derivations whose build has begun, with these: they are not
        downloaded, neither for who wants them nor for what refers to them, even if the build
        has failed.
    :ivar retried: the derivations with all that they are built from, for whose outputs
        substitutes were looked for once more.
    """

    given_up: set[StorePath] = field(default_factory=set)
    begun: dict[StorePath, StorePath] = field(default_factory=dict)
    retried: set[StorePath] = field(default_factory=set)


Plan = Callable[[Past], Coroutine[Any, Any, dict[StorePath, Goal]]]
"""Finds the goals of a request, by their paths."""


class RequestRun:
    """One request while it is carried out.

    :param plan: called at the start, and whenever there is something to plan anew.
    """

    def __init__(
        self,
        clock: IReactorTime,
        builds: Builds,
        plan: Plan,
        request: BuildRequest,
        observer: Observer,
        share: Share,
    ) -> None:
        self.request = request
        self._clock = clock
        self._builds = builds
        self._plan = plan
        self._observer = observer
        self._share = share
        self._past = Past()
        self._goals: dict[StorePath, Goal] = {}
        self._active: dict[StorePath, tuple[Goal, Running, object]] = {}
        self._results: dict[StorePath, tuple[Goal, Result]] = {}
        self._events: deque[tuple[Goal, Result | None]] = deque()
        self._working = False
        self._outdated = True
        """Whether the goals are to be planned anew."""
        self._planning: Deferred[Any] | None = None
        self._rests_until = 0.0
        self._hope: Running | None = None
        """A build that was not stuck when last looked at."""
        self._left = 0
        self._code = 1
        self._failed: set[StorePath] = set()
        self._general = ""
        self._done: Deferred[None] = Deferred()

    async def run(self) -> None:
        """Make all that is wanted valid.

        :raises BuildError: a wanted derivation failed.
        """
        try:
            self._work()
            await self._done
        finally:
            self._leave()

    def changed(self) -> None:
        """See whether anything can still go on."""
        if self._working or self._done.called or self._planning is not None:
            return
        if not self._active:
            self._done.errback(BuildError(CIRCLE))
        elif not self._share.may_start(local=False) and self._is_stuck():
            self._done.errback(BuildError(STOPPING if self._share.closed else NO_SLOTS))

    def _is_stuck(self) -> bool:
        if self._hope is None or self._hope.stuck or self._hope.path not in self._active:
            self._hope = next((b for _, b, _ in self._active.values() if not b.stuck), None)
        return self._hope is None

    def _leave(self) -> None:
        self._events.clear()
        self._share.close()
        if self._planning is not None:
            self._planning.cancel()
        for path in tuple(self._active):
            self._let_go(path)

    def _let_go(self, path: StorePath) -> None:
        _, build, attachment = self._active.pop(path)
        build.detach(attachment)

    # --- plans -----------------------------------------------------------------------

    def _plan_anew(self) -> None:
        self._planning = planning = Deferred.fromCoroutine(self._plan_after_rest())
        planning.addCallback(self._adopt).addErrback(self._fail)

    def _plan_soon(self) -> None:
        self._outdated, self._rests_until = True, 0.0

    async def _plan_after_rest(self) -> dict[StorePath, Goal]:
        """Plan, but not all the time when one download after the other fails."""
        clock = self._clock
        rest = self._rests_until - clock.seconds()
        if rest > 0:
            await deferLater(clock, rest)
        began = clock.seconds()
        goals = await self._plan(self._past)
        ended = clock.seconds()
        self._rests_until = ended + min(REST * (ended - began), LONGEST_REST)
        return goals

    def _fail(self, failure: Failure) -> None:
        self._planning = None
        if not self._done.called:
            self._done.errback(failure)

    def _adopt(self, goals: dict[StorePath, Goal]) -> None:
        """Go on with GOALS instead of those of before; what runs and is one of them goes on."""
        self._planning, self._outdated = None, False
        if self._done.called:
            return
        self._goals, self._left = goals, len(goals)
        self._events.clear()
        for path, (old, _, _) in tuple(self._active.items()):
            if path in goals and goals[path].is_same(old):
                goals[path].started = True
            else:
                self._let_go(path)
        for path, (old, result) in self._results.items():  # maybe they ended during the planning
            if path in goals and goals[path].is_same(old):
                goals[path].started = True
                self._events.append((goals[path], result))
        ready = [goal for goal in goals.values() if not goal.started and self._is_ready(goal)]
        ready.sort(key=lambda goal: goal.priority)
        self._events.extend((goal, None) for goal in ready)
        if not goals:
            self._end()
        self._work()

    def _is_ready(self, goal: Goal) -> bool:
        # Without keep-going, it does not wait for its other inputs any more.
        return not goal.pending or bool(goal.failed and not self.request.options.keep_going)

    # --- events: goals that are ready (None) or have a result ----------------------

    def _work(self) -> None:
        """Treat the events there are, one after the other, new ones included."""
        if self._working:
            return
        self._working = True
        turns = Turns(self._clock)
        try:
            while self._events and not self._done.called:
                if turns.over:
                    self._clock.callLater(0, self._go_on)
                    return
                goal, result = self._events.popleft()
                if result is None and not goal.started:
                    goal.started = True
                    self._start(goal)
                elif result is not None:
                    self._finished(goal, result)
        except BaseException:
            self._working = False
            raise
        self._working = False
        if self._outdated and self._planning is None and not self._done.called:
            self._plan_anew()
        self.changed()

    def _go_on(self) -> None:
        self._working = False
        self._work()

    def _start(self, goal: Goal) -> None:
        """Begin with GOAL, whose inputs are all done, well or not."""
        if goal.failed:
            self._refuse(goal, Result(Status.DEPENDENCY_FAILED, _failed_dependencies(goal)))
        elif goal.outdated:
            self._plan_soon()
        elif goal.offer is not None:
            download, place = self._builds.substitute(goal, self, self._observer)
            self._active[goal.path] = goal, download, place
            place.result.addCallback(lambda result: self._ended(goal, result))
        elif goal.drv is None or goal.error:
            self._refuse(goal, self._refusal(goal))
        elif goal.hopeful and goal.path not in self._past.retried:
            if self._planning is None:
                self._past.retried.add(goal.path)
            self._plan_soon()
        else:
            self._past.begun.update(dict.fromkeys(goal.drv.output_paths, goal.path))
            build, attachment = self._builds.attach(goal, self, self._observer, self._share)
            self._active[goal.path] = goal, build, attachment
            attachment.result.addCallback(lambda result: self._ended(goal, result))

    def _refusal(self, goal: Goal) -> Result:
        if goal.failed_before:
            return Result(Status.CACHED_FAILURE, goal.error)
        return Result(Status.MISC_FAILURE, goal.error, general=not goal.missing)

    def _refuse(self, goal: Goal, result: Result) -> None:
        if not result.general:
            self._observer.log(Level.ERROR, result.message)
        if result.status is Status.CACHED_FAILURE:
            self._observer.trace(BuildFailedBefore(goal.path).line)
        self._settle(goal, result)

    def _ended(self, goal: Goal, result: Result) -> None:
        """What ran for GOAL, in this plan or an older one, has ended with RESULT."""
        if self._active.pop(goal.path, None) is None:
            return  # it was let go
        if goal.offer is not None and not result.status.succeeded:
            text = result.text
            if not (self.request.options.fallback or goal.named):
                text += "; use `--fallback' to build what cannot be downloaded"
            result = Result(result.status, text, general=True)
        self._settle(goal, result)
        self._work()

    def _settle(self, goal: Goal, result: Result) -> None:
        """GOAL has ended with RESULT, which is told once, whatever the plans are."""
        self._results[goal.path] = goal, result
        # Without keep-going what fails while the first failure waits for its turn comes too late.
        late = bool(self._failed) and not self.request.options.keep_going
        if not result.status.succeeded and not self._can_do_without(goal) and not late:
            self._code = max(self._code, result.status.code)
            if result.general:
                self._general = self._general or result.text
                if not self._ends_with_general:
                    self._observer.log(Level.ERROR, result.text)
                    if self._has_begun(goal):  # guix would tell that it goes on
                        self._observer.trace(BuildFailed(goal.path, 1, result.text).line)
            if goal.top or (goal.offer is not None and not self.request.options.keep_going):
                self._failed.add(goal.path)
        current = self._goals.get(goal.path)
        if current is not None and current.is_same(goal):
            # Without keep-going the first failure is the last: others are not even begun.
            first = not (result.status.succeeded or self.request.options.keep_going)
            (self._events.appendleft if first else self._events.append)((current, result))

    def _has_begun(self, goal: Goal) -> bool:
        outputs = goal.drv.output_paths if goal.drv is not None else ()
        return any(self._past.begun.get(output) == goal.path for output in outputs)

    def _can_do_without(self, goal: Goal) -> bool:
        """Whether what GOAL downloads may be built instead, or not be needed."""
        return goal.offer is not None and self.request.options.fallback and not goal.named

    def _finished(self, goal: Goal, result: Result) -> None:
        """Go on after GOAL, which may have ended in an older plan."""
        succeeded = result.status.succeeded
        if succeeded and goal.unfolds:
            self._plan_soon()
            return
        if not succeeded and self._can_do_without(goal):
            self._past.given_up.add(goal.path)
            self._outdated = True
            return
        self._left -= 1
        if goal.path in self._failed and not self.request.options.keep_going:
            self._left = 0
        dependents = goal.dependents
        if not succeeded:  # so that it is always the same one that fails next
            dependents = sorted(dependents, key=lambda dependent: dependent.key)
        for dependent in dependents:
            dependent.pending -= 1
            if not succeeded:
                dependent.failed += 1
                dependent.culprit = dependent.culprit or goal.culprit or goal.path
            if self._is_ready(dependent):
                self._events.append((dependent, None))
        if not self._left:
            self._end()

    @property
    def _ends_with_general(self) -> bool:
        """Whether the text of the first general failure is also the last word."""
        return not self.request.options.keep_going or len(self._goals) == 1

    def _end(self) -> None:
        if not self._failed:
            self._done.callback(None)
            return
        if self._general and self._ends_with_general:
            text = self._general
        else:
            names = ", ".join(f"`{path}'" for path in sorted(self._failed))
            text = f"build of {names} failed"
        self._done.errback(BuildError(text, self._code))


def _failed_dependencies(goal: Goal) -> str:
    if goal.offer is not None:
        return f"cannot download `{goal.path}': what it refers to could not be had"
    text = f"cannot build derivation `{goal.path}': {goal.failed} dependencies couldn't be built"
    if goal.culprit is not None:
        text += f"; the first that failed is `{goal.culprit}'"
    return text
