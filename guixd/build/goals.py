"""Carrying out one request: its goals in order, and the error that ends it (build.md §2, §3)."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

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
from guixd.formats.trace import BuildFailedBefore

NO_SLOTS = "unable to start any build: `--max-jobs' is 0 and none can be offloaded"
STOPPING = "the build daemon is stopping and begins no more builds; try again when it is back"
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


class RequestRun:
    """One request while it is carried out.

    :ivar given_up: what could not be substituted, so that the request is to be planned
        anew without it.
    """

    def __init__(
        self,
        clock: IReactorTime,
        builds: Builds,
        goals: Collection[Goal],
        request: BuildRequest,
        observer: Observer,
        share: Share,
    ) -> None:
        self.request = request
        self._clock = clock
        self._builds = builds
        self._goals = goals
        self._observer = observer
        self._share = share
        self._active: dict[StorePath, tuple[Running, object]] = {}
        self._events: deque[tuple[Goal, Result | None]] = deque()
        self._working = False
        self.given_up: set[StorePath] = set()
        self._hope: Running | None = None
        """A build that was not stuck when last looked at."""
        self._left = len(goals)
        self._code = 1
        self._failed: list[StorePath] = []
        self._general = ""
        self._done: Deferred[None] = Deferred()

    async def run(self) -> None:
        """Make all that is wanted valid; there is something to do.

        :raises BuildError: a wanted derivation failed.
        """
        keep_going = self.request.options.keep_going
        ready = [g for g in self._goals if not g.pending or (g.failed and not keep_going)]
        ready.sort(key=lambda goal: goal.priority)
        self._events.extend((goal, None) for goal in ready)
        try:
            self._work()
            await self._done
        finally:
            self._leave()

    def changed(self) -> None:
        """See whether anything can still go on."""
        if self._working or self._done.called:
            return
        if not self._active:
            self._done.errback(BuildError(CIRCLE))
        elif not self._share.may_start(local=False) and self._is_stuck():
            self._done.errback(BuildError(STOPPING if self._share.closed else NO_SLOTS))

    def _is_stuck(self) -> bool:
        if self._hope is None or self._hope.stuck or self._hope.path not in self._active:
            self._hope = next((b for b, _ in self._active.values() if not b.stuck), None)
        return self._hope is None

    def _leave(self) -> None:
        self._events.clear()
        self._share.close()
        active, self._active = self._active, {}
        for build, attachment in active.values():
            build.detach(attachment)

    # --- events: goals that are ready (None) or have a result ----------------------

    def _event(self, goal: Goal, result: Result | None) -> None:
        self._events.append((goal, result))
        self._work()

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
        self.changed()

    def _go_on(self) -> None:
        self._working = False
        self._work()

    def _start(self, goal: Goal) -> None:
        """Begin with GOAL, whose inputs are all done, well or not."""
        if goal.skipped or (goal.offer is not None and goal.failed):
            self._events.append((goal, Result(Status.INCOMPLETE_CLOSURE)))
        elif goal.failed:
            text = (
                f"cannot build derivation `{goal.path}':"
                f" {goal.failed} dependencies couldn't be built"
            )
            self._refuse(goal, Result(Status.DEPENDENCY_FAILED, text))
        elif goal.offer is not None:
            download, place = self._builds.substitute(goal, self, self._observer)
            self._active[goal.path] = (download, place)
            place.result.addCallback(lambda result: self._built(goal, result))
        elif goal.drv is None or goal.error:
            self._refuse(goal, self._refusal(goal))
        else:
            build, attachment = self._builds.attach(goal, self, self._observer, self._share)
            self._active[goal.path] = (build, attachment)
            attachment.result.addCallback(lambda result: self._built(goal, result))

    def _refusal(self, goal: Goal) -> Result:
        if goal.failed_before:
            return Result(Status.CACHED_FAILURE, goal.error)
        return Result(Status.MISC_FAILURE, goal.error, general=not goal.missing)

    def _refuse(self, goal: Goal, result: Result) -> None:
        if not result.general:
            self._observer.log(Level.ERROR, result.text)
        if result.status is Status.CACHED_FAILURE:
            self._observer.trace(BuildFailedBefore(goal.path).line)
        self._events.append((goal, result))

    def _built(self, goal: Goal, result: Result) -> None:
        self._active.pop(goal.path, None)
        self._event(goal, result)

    def _finished(self, goal: Goal, result: Result) -> None:
        self._left -= 1
        keep_going = self.request.options.keep_going
        if goal.offer is not None and not result.status.succeeded:
            result = self._not_substituted(goal, result)
        if result.status.unavailable:
            for dependent in goal.dependents:
                dependent.skipped = True
        elif not result.status.succeeded:
            self._code = max(self._code, result.status.code)
            if result.general:
                self._general = self._general or result.text
                if not self._ends_with_general:
                    self._observer.log(Level.ERROR, result.text)
            if goal.top or (goal.offer is not None and not keep_going):
                self._failed.append(goal.path)
                if not keep_going:
                    self._left = 0
        for dependent in goal.dependents:
            dependent.pending -= 1
            if not result.status.succeeded and not result.status.unavailable:
                dependent.failed += 1
            # Without keep-going, it does not wait for its other inputs any more.
            if not dependent.pending or (dependent.failed and not keep_going):
                self._events.append((dependent, None))
        if not self._left:
            self._end()

    def _not_substituted(self, goal: Goal, result: Result) -> Result:
        """Return what it means that the download of GOAL has ended with RESULT."""
        if result.status.unavailable or self.request.options.fallback:
            self.given_up.add(goal.path)
            return Result(Status.NO_SUBSTITUTERS, result.text)
        text = f"{result.text}; use `--fallback' to build what cannot be downloaded"
        return Result(result.status, text, general=True)

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
