"""What is alive, against a model (spec: gc §2)."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.formats.path import StoreDirectory, StorePath
from guixd.store.liveness import Liveness, Marked
from guixd.store.schema import connect, prepare
from tests.support import temporary_directory

STORE = StoreDirectory("/gnu/store")
MOST = 12


@dataclass(frozen=True)
class Graph:
    """Items by number; who refers to whom, what makes what, and what was recorded as that."""

    valid: frozenset[int]
    references: frozenset[tuple[int, int]]
    outputs: frozenset[tuple[int, int]]
    derivers: dict[int, int]
    roots: frozenset[int]


numbers = st.integers(0, MOST - 1)
graphs = st.builds(
    lambda valid, references, outputs, derivers, roots: Graph(
        valid,
        # Never in a circle, but for items that refer to themselves.
        frozenset((a, b) for a, b in references if b <= a and {a, b} <= valid),
        frozenset((drv, out) for drv, out in outputs if drv in valid and drv % 3 == 0),
        derivers,
        roots,
    ),
    st.frozensets(numbers),
    st.frozensets(st.tuples(numbers, numbers), max_size=30),
    st.frozensets(st.tuples(numbers, numbers), max_size=8),
    st.dictionaries(numbers, numbers),
    st.frozensets(numbers, max_size=3),
)


def path(number: int) -> StorePath:
    return STORE.child(f"{number:032}-{'drv.drv' if number % 3 == 0 else 'item'}")


def fill(connection: sqlite3.Connection, graph: Graph) -> None:
    connection.execute("DELETE FROM Refs")
    connection.execute("DELETE FROM ValidPaths")
    for number in graph.valid:
        deriver = graph.derivers.get(number)
        connection.execute(
            "INSERT INTO ValidPaths (id, path, hash, registrationTime, deriver, narSize)"
            " VALUES (?, ?, '', 0, ?, ?)",
            (number + 1, path(number), None if deriver is None else path(deriver), number),
        )
    for referrer, reference in graph.references:
        connection.execute("INSERT INTO Refs VALUES (?, ?)", (referrer + 1, reference + 1))
    for drv, output in graph.outputs:
        connection.execute(
            "INSERT INTO DerivationOutputs VALUES (?, ?, ?)", (drv + 1, f"o{output}", path(output))
        )


def model(graph: Graph, *, keep_outputs: bool, keep_derivations: bool) -> set[int]:
    """Return the live items by looking backwards from each: is something alive that needs it?"""

    def needed_by(item: int) -> set[int]:
        found = {a for a, b in graph.references if b == item}
        if keep_derivations and item % 3 == 0:
            outputs = {out for drv, out in graph.outputs if drv == item}
            found |= {out for out in outputs & graph.valid if graph.derivers.get(out) == item}
        if keep_outputs:
            found |= {drv for drv, out in graph.outputs if out == item}
        return found

    def is_alive(item: int, seen: Callable[[], set[int]] = set) -> bool:
        visited, queue = seen(), [item]
        while queue:
            one = queue.pop()
            if one in visited:
                continue
            visited.add(one)
            if one in graph.roots and one in graph.valid:
                return True
            queue += needed_by(one)
        return False

    return {item for item in graph.valid if is_alive(item)}


class ModelTests(SynchronousTestCase):
    """G11, G12: roots, references, and both kinds of other links."""

    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        prepare(self.directory)
        self.connection = connect(self.directory)
        self.addCleanup(self.connection.close)

    def mark(self, graph: Graph, *, keep_outputs: bool, keep_derivations: bool) -> Marked:
        fill(self.connection, graph)
        liveness = Liveness(self.directory, STORE)
        try:
            return liveness.mark(
                [path(number) for number in graph.roots],
                keep_outputs=keep_outputs,
                keep_derivations=keep_derivations,
            )
        finally:
            liveness.close()

    @settings(max_examples=150, deadline=None)
    @given(graphs, st.booleans(), st.booleans())
    def test_model(self, graph: Graph, outputs: bool, derivations: bool) -> None:
        marked = self.mark(graph, keep_outputs=outputs, keep_derivations=derivations)
        alive = model(graph, keep_outputs=outputs, keep_derivations=derivations)
        self.assertEqual(marked.alive, {path(number) for number in alive})
        dead = {item.path: item.size for item in marked.dead.values()}
        self.assertEqual(dead, {path(number): number for number in graph.valid - alive})

    @settings(max_examples=100, deadline=None)
    @given(graphs, st.data())
    def test_order(self, graph: Graph, data: st.DataObject) -> None:
        """G4: what refers to an item goes before it, and nothing goes twice."""
        marked = self.mark(graph, keep_outputs=False, keep_derivations=False)
        rows = data.draw(st.permutations(sorted(marked.dead)))
        first = data.draw(st.integers(0, len(rows)))
        order = [item.row for item in marked.referrers_first(rows[:first])]
        self.assertEqual(len(order), len(set(order)))
        self.assertTrue(set(rows[:first]) <= set(order))
        for referrer, reference in graph.references:
            if referrer != reference and reference + 1 in order:
                self.assertLess(order.index(referrer + 1), order.index(reference + 1))
