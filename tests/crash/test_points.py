"""The daemon dies at each of its named points, and the next one goes on."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from itertools import groupby
from typing import Any

from twisted.trial.unittest import TestCase

from tests.crash.points import points
from tests.crash.rounds import Rounds
from tests.crash.site import requires_builders

LATER = 6
"""A second death is at one of so many later passes of a point, if there are."""
_FIRST_START = ("layout",)
"""Areas whose points are only passed when there is no store yet."""


@requires_builders
class PointTests(TestCase):
    timeout = 120

    async def die_at(self, area: str, names: list[str]) -> None:
        rounds = Rounds(self, area)
        for name in names:
            if area in _FIRST_START:
                rounds.renew()
            death = await rounds.until_death(rounds.scripts(1, 0), fault=name)
            self.assertTrue(death.by_itself, f"{name} is never reached")
            if area not in _FIRST_START:
                later = rounds.random.randint(2, LATER)
                await rounds.until_death(rounds.scripts(2, 4), fault=f"{name}:{later}")
        await rounds.finish()


def _test(area: str, names: list[str]) -> Callable[[PointTests], Coroutine[Any, Any, None]]:
    async def test(self: PointTests) -> None:
        await self.die_at(area, names)

    test.__doc__ = f"Points of {area}."
    return test


for _area, _names in groupby(sorted(points()), key=lambda name: name.partition(".")[0]):
    setattr(PointTests, f"test_{_area}", _test(_area, list(_names)))
