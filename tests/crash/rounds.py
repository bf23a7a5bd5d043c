"""One death after the other of the daemon of one store, and a look at what is left."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from twisted.trial.unittest import TestCase

from tests.crash.nursery import Death
from tests.crash.site import PATIENCE, Site, reactor
from tests.crash.work import Task


class Rounds:
    """A store through many deaths.

    :param seed: decides what clients do and when the daemon dies.
    :ivar random: what SEED decides.
    """

    def __init__(self, case: TestCase, seed: str, *options: str) -> None:
        self.random = Random(seed)
        self._seed = seed
        self._case = case
        self._options = options
        self._number = 0
        self._interrupted: Sequence[Sequence[Task]] = ()
        self.site = Site(case, *options)

    def renew(self) -> None:
        """Begin with a store that does not exist."""
        self.site.end()
        self.site = Site(self._case, *self._options)
        self._interrupted = ()

    def scripts(self, clients: int, length: int) -> list[list[Task]]:
        """Return what some clients can do next, as many tasks each; all kinds if LENGTH is 0."""
        found = []
        for client in range(clients):
            work = self.site.work(self.random, f"{self._number}-{client}")
            found.append(work.script(length) if length else work.everything())
        return found

    async def until_death(
        self,
        scripts: Sequence[Sequence[Task]],
        *,
        fault: str = "",
        calls: int = 0,
        seconds: float | None = None,
    ) -> Death:
        """Let a daemon die while clients carry out SCRIPTS, after all that is left of before.

        :param fault: where it dies, see `guixd.faults`.
        :param calls: at which call it dies.
        :param seconds: when it is killed.
        :return: how it died; `by_itself` tells whether that was before the end of SCRIPTS.
        """
        self._number += 1
        try:
            return await self._until_death(scripts, fault, calls, seconds)
        except Exception as error:
            how = fault or (f"call {calls}" if calls else f"{seconds} s")
            raise AssertionError(
                f"seed {self._seed}, round {self._number} ({how}): {error}"
            ) from error

    async def _until_death(
        self,
        scripts: Sequence[Sequence[Task]],
        fault: str,
        calls: int,
        seconds: float | None,
    ) -> Death:
        site = self.site
        site.start()
        await self.recover()
        site.arm(fault, calls)
        deaths: list[Death] = []
        timer = None
        if seconds is not None:
            timer = reactor.callLater(seconds, lambda: deaths.append(site.end()))
        finished = await site.do(*scripts)
        self._interrupted = site.begun
        if timer is not None and timer.active():
            timer.cancel()
        if deaths:
            return deaths[0]
        return site.end(0 if finished else PATIENCE)

    async def recover(self) -> None:
        """Do again what was interrupted, with the daemon that runs, and look at the store."""
        if not self._interrupted:
            return  # there may be no store yet
        await self.site.keep_promises()
        if not await self.site.do(*self._interrupted):
            raise AssertionError("the daemon died while it recovered")
        self._interrupted = ()
        self.site.inspect()
        self.site.forget_kept()

    async def finish(self) -> None:
        """Recover a last time, after which nothing may be left of what was interrupted."""
        self.site.start()
        await self.recover()
        await self.site.do(*self.scripts(1, 0))
        await self.site.collect()
        self.site.inspect()
        self.site.forget_kept()
        left = self.site.leftovers()
        if left:
            raise AssertionError(f"left over: {left}")
        self.site.end()
