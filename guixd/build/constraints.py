"""What outputs may refer to (build.md §8)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

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
) -> None:
    """Test what fresh outputs refer to against the rules of their derivation; may be long.

    :param references: of each fresh output.
    :param queries: for what is valid already.
    :raises BuildFailure: a rule is broken or cannot be read (output rejected).
    """
    rules = {name: _words(drv, store, name) for name in RULES if name in drv.environment}
    for name, listed in rules.items():
        for path in sorted(references):
            requisites = name.endswith("Requisites")
            used = _requisites(path, references, queries) if requisites else references[path]
            wrong = used - listed if name.startswith("allowed") else used & listed
            if wrong:
                text = f"output `{path}' refers to `{min(wrong)}', which `{name}' does not allow"
                if requisites:
                    text += _way(path, min(wrong), references, queries)
                raise BuildFailure(Status.OUTPUT_REJECTED, text)


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
) -> str:
    """Return how END came in, by one of the shortest ways; empty if there is nothing between."""
    came_from: dict[StorePath, StorePath] = {start: start}
    todo = deque([start])
    while todo and end not in came_from:
        path = todo.popleft()
        used: Iterable[StorePath] = references.get(path) or queries.path_info(path).references
        for one in sorted(used):
            if one not in came_from:
                came_from[one] = path
                todo.append(one)
    between = []
    path = came_from[end]
    while path != start:
        between.append(path)
        path = came_from[path]
    return (
        "; it comes by way of " + ", ".join(f"`{p}'" for p in reversed(between)) if between else ""
    )
