"""The daemon dies at any moment, and the next one goes on."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.trial.unittest import TestCase

from tests.crash.rounds import Rounds
from tests.crash.site import requires_builders

SEEDS = 8
DEATHS = 16
"""How often each seed's daemon dies."""
CLIENTS = 2
LENGTH = 3


@requires_builders
class RandomTests(TestCase):
    timeout = 120

    async def die(self, seed: int) -> None:
        """Die at calls of the system, so that a seed is the same each time, and at times."""
        rounds = Rounds(self, f"random {seed}")
        most = 2000
        for number in range(DEATHS):
            scripts = rounds.scripts(CLIENTS, LENGTH)
            if number % 4 == 3:
                await rounds.until_death(scripts, seconds=rounds.random.uniform(0, 0.15))
            else:
                last = rounds.random.randrange(1, most)
                death = await rounds.until_death(scripts, calls=last)
                most = max(most if death.by_itself else death.calls, 500)
        await rounds.finish()
        self.assertEqual(rounds.site.kills, DEATHS + 1)


def _test(seed: int) -> Callable[[RandomTests], Coroutine[Any, Any, None]]:
    async def test(self: RandomTests) -> None:
        await self.die(seed)

    return test


for _seed in range(SEEDS):
    setattr(RandomTests, f"test_seed_{_seed}", _test(_seed))
