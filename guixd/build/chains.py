"""In which order the goals of a request had best be built (spec: build §3).

What something waits for comes before what nothing waits for, and what begins the
longest chain of builds, in seconds as far as they are known, comes first of all:
the request cannot end before its longest chain does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from guixd.build.plan import Goal


def rank(goals: Collection[Goal], seconds: Callable[[str], float]) -> Iterator[None]:
    """Set the `priority` of GOALS, a small step at a time.

    :param seconds: how long a derivation of some name takes.
    """
    pending = {goal: goal.pending for goal in goals}
    order = [goal for goal in goals if not goal.pending]
    for goal in order:  # which grows meanwhile: inputs first
        for dependent in goal.dependents:
            pending[dependent] -= 1
            if not pending[dependent]:
                order.append(dependent)
        yield
    chains: dict[Goal, float] = {}
    for goal in reversed(order):
        after = max((chains[d] for d in goal.dependents if d in chains), default=0.0)
        chains[goal] = chain = after + seconds(goal.path.name)
        goal.priority = (not goal.dependents, -chain, *goal.key)
        yield
