"""Graphs of derivations of which some fail, by the real client."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, Facts, Place

SIZE = 500


@dataclass
class Graph:
    """Nodes by number, each with its exit status and the earlier nodes that it needs."""

    nodes: list[tuple[int, list[int]]]

    @property
    def text(self) -> str:
        lines = [
            " ".join([f"n{number:03}", str(status), *(f"n{each:03}" for each in needed)])
            for number, (status, needed) in enumerate(self.nodes)
        ]
        return "\n".join(lines) + "\n"

    @property
    def good(self) -> set[str]:
        """The names of those that can be built."""
        good: set[int] = set()
        for number, (status, needed) in enumerate(self.nodes):
            if not status and good.issuperset(needed):
                good.add(number)
        return {f"n{number:03}" for number in good}

    @property
    def tops(self) -> set[str]:
        """The names of those that no other needs."""
        needed = {each for _, others in self.nodes for each in others}
        return {f"n{number:03}" for number in range(len(self.nodes)) if number not in needed}


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Draw a graph in which about a tenth of the nodes fail, at least one."""
    random = draw(st.randoms(use_true_random=False))
    nodes = []
    bad = random.sample(range(SIZE), max(1, SIZE // 12))
    for number in range(SIZE):
        needed = random.sample(range(number), min(number, random.choice((0, 1, 1, 2, 3))))
        nodes.append((3 if number in bad else 0, sorted(needed)))
    return Graph(nodes)


once = settings(
    max_examples=1,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@requires_guest
class Graphs(SynchronousTestCase):
    """The set of what is valid afterwards is the one that a model predicts."""

    def build(self, daemon: str, graph: Graph, *, keep_going: bool, jobs: int) -> Facts:
        place = Place(self)
        (place.directory / "work/graph").write_text(graph.text)
        place.start(daemon)
        facts = place.scheme("graph.scm", KEEP_GOING="yes" if keep_going else "no", JOBS=str(jobs))
        place.stop()
        self.assertEqual(list((place.directory / "build").iterdir()), [])
        return facts

    def check(self, facts: Facts, graph: Graph, *, keep_going: bool) -> None:
        """B2, B3, B32: statuses, what is named, and what is valid."""
        self.assertEqual(facts["result"], "100")
        valid, failed = set(facts.strings("valid")), set(facts.strings("failed"))
        if keep_going:
            self.assertEqual(valid, graph.good)
            self.assertEqual(failed, graph.tops - graph.good)
        else:
            self.assertLessEqual(valid, graph.good)
            self.assertEqual(len(failed), 1)
            self.assertLessEqual(failed, graph.tops - graph.good)
        for name in valid:  # all inputs of what is valid are
            _, needed = graph.nodes[int(name[1:])]
            self.assertLessEqual({f"n{each:03}" for each in needed}, valid)

    @once
    @given(graphs())
    def test_same_as_stock(self, graph: Graph) -> None:
        """B3, B27, B32: with keep-going, outputs, registrations, status are the stock daemon's."""
        stock, guixd = (
            self.build(daemon, graph, keep_going=True, jobs=4) for daemon in (STOCK, GUIXD)
        )
        self.check(guixd, graph, keep_going=True)
        self.assertEqual(dict(stock), dict(guixd))

    @once
    @given(graphs())
    def test_without_keep_going(self, graph: Graph) -> None:
        """B4, B32: without keep-going, nothing is valid that should not be."""
        facts = self.build(GUIXD, graph, keep_going=False, jobs=4)
        self.check(facts, graph, keep_going=False)
