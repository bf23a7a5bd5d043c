"""What outputs may refer to (spec: build §8)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

from guixd.build.results import BuildFailure, Status
from guixd.errors import NotInStore
from guixd.formats.derivation import Derivation
from guixd.formats.path import StoreDirectory, StorePath
from guixd.store.queries import Queries

RULES = (
    "allowedReferences",
    "allowedRequisites",
    "disallowedReferences",
    "disallowedRequisites",
)
"""Variables of a derivation, in the order in which they are tested."""


def has_rules(drv: Derivation) -> bool:
    """Whether `check_references` has anything to do for DRV."""
    return any(name in drv.environment for name in RULES)


def check_references(
    drv: Derivation,
    store: StoreDirectory,
    references: Mapping[StorePath, frozenset[StorePath]],
    queries: Queries,
    locate: Callable[[StorePath, StorePath], str],
) -> None:
    """Test what fresh outputs refer to against the rules of their derivation; may be long.

    :param references: of each fresh output.
    :param queries: for what is valid already.
    :param locate: returns the file of a fresh output that has a reference; maybe empty.
    :raises BuildFailure: a rule is broken or cannot be read (output rejected).
    """
    rules = {name: _words(drv, store, name) for name in RULES if name in drv.environment}
    for name, listed in rules.items():
        for path in sorted(references):
            requisites = name.endswith("Requisites")
            used = _requisites(path, references, queries) if requisites else references[path]
            wrong = used - listed if name.startswith("allowed") else used & listed
            if wrong:
                way = _way(path, min(wrong), references, queries)
                text = f"output `{path}' refers to `{min(wrong)}', which `{name}' does not allow"
                if way[:-1]:
                    text += "; it comes by way of " + ", ".join(f"`{each}'" for each in way[:-1])
                file = locate(path, way[0])
                advice = [f"the reference to `{way[0]}' is in `{file}'"] if file else []
                raise BuildFailure(Status.OUTPUT_REJECTED, text, *advice)


def _words(drv: Derivation, store: StoreDirectory, name: str) -> frozenset[StorePath]:
    paths = set()
    for word in drv.environment[name].split():
        if word in drv.outputs:
            paths.add(drv.outputs[word].path)
            continue
        try:
            paths.add(store.parse(word))
        except NotInStore:
            raise BuildFailure(
                Status.OUTPUT_REJECTED,
                f"invalid reference specifier `{word}' in `{name}'",
                "it must be a store file name or the name of an output of the derivation",
            ) from None
    return frozenset(paths)


def _requisites(
    path: StorePath, references: Mapping[StorePath, frozenset[StorePath]], queries: Queries
) -> frozenset[StorePath]:
    """Return all that PATH needs, but not PATH itself; sisters may not be valid yet."""
    found: set[StorePath] = set()
    valid: set[StorePath] = set()
    todo = [path]
    while todo:
        for used in references[todo.pop()]:
            if used == path or used in found:
                continue
            if used in references:
                found.add(used)
                todo.append(used)
            else:
                valid.add(used)
    found.update(queries.closure(valid))
    return frozenset(found - {path})


def _way(
    start: StorePath,
    end: StorePath,
    references: Mapping[StorePath, frozenset[StorePath]],
    queries: Queries,
) -> list[StorePath]:
    """Return how END came in, by one of the shortest ways from START, which is left out."""
    came_from: dict[StorePath, StorePath] = {start: start}
    todo = deque([start])
    while todo and end not in came_from:
        path = todo.popleft()
        used: Iterable[StorePath] = references.get(path) or queries.path_info(path).references
        for one in sorted(used):
            if one not in came_from:
                came_from[one] = path
                todo.append(one)
    way = [end]
    while came_from[way[-1]] != start:
        way.append(came_from[way[-1]])
    return way[::-1]
