"""What outputs may refer to, and graphs handed to builders (build.md §7, §8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from guixd.build.results import BuildFailure, Status
from guixd.errors import BadName, GuixdError, NotInStore
from guixd.formats.derivation import Derivation
from guixd.formats.path import StoreDirectory, StorePath, check_name

Closure = Callable[[Iterable[StorePath]], Iterable[StorePath]]
"""Gives the closure of valid paths, themselves included."""

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
    closure: Closure,
) -> None:
    """Test what fresh outputs refer to against the rules of their derivation.

    :param references: of each fresh output.
    :raises BuildFailure: a rule is broken or cannot be read (output rejected).
    """
    rules = {name: _words(drv, store, name) for name in RULES if name in drv.environment}
    for name, listed in rules.items():
        for path in sorted(references):
            used = references[path]
            if name.endswith("Requisites"):
                used = _requisites(path, references, closure)
            wrong = used - listed if name.startswith("allowed") else used & listed
            if wrong:
                raise BuildFailure(
                    Status.OUTPUT_REJECTED,
                    f"output `{path}' refers to `{min(wrong)}', which `{name}' does not allow",
                )


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
    path: StorePath,
    references: Mapping[StorePath, frozenset[StorePath]],
    closure: Closure,
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
    found.update(closure(valid))
    return frozenset(found - {path})


def export_graphs(
    drv: Derivation,
    store: StoreDirectory,
    is_valid: Callable[[StorePath], bool],
    references: Callable[[StorePath], Iterable[StorePath]],
    closure: Closure,
    read_derivation: Callable[[StorePath], Derivation],
) -> dict[str, str]:
    """Return the files that `exportReferencesGraph` asks for, by name.

    :raises BuildFailure: the list is not of the right form (input rejected).
    :raises GuixdError: a file name that cannot be.
    """
    words = drv.environment.get("exportReferencesGraph", "").split()
    if len(words) % 2:
        raise BuildFailure(
            Status.INPUT_REJECTED,
            "`exportReferencesGraph' is not made of pairs of a file and a path",
        )
    files = {}
    for name, text in zip(words[::2], words[1::2], strict=True):
        try:
            check_name(name)
        except BadName as error:
            raise GuixdError(f"`exportReferencesGraph': {error.text}") from None
        try:
            item = store.containing(text)
        except NotInStore as error:
            raise BuildFailure(Status.INPUT_REJECTED, error.text) from None
        if not is_valid(item):
            raise BuildFailure(
                Status.INPUT_REJECTED, f"`exportReferencesGraph' names the invalid path `{item}'"
            )
        paths = set(closure([item]))
        outputs: set[StorePath] = set()
        for path in paths:
            if path.is_derivation:
                outputs.update(read_derivation(path).output_paths)
        paths.update(closure(outputs))
        pieces = []
        for path in sorted(paths):
            used = sorted(references(path))
            pieces.append("\n".join([path, "", str(len(used)), *used]) + "\n")
        files[name] = "".join(pieces)
    return files
