"""The graphs of references that builders ask for (spec: build §7, `exportReferencesGraph`)."""

from __future__ import annotations

from guixd.build.results import BuildFailure, Status
from guixd.errors import BadName, GuixdError, NotInStore
from guixd.formats.derivation import Derivation
from guixd.formats.path import StoreDirectory, StorePath, check_name
from guixd.store.queries import Queries

VARIABLE = "exportReferencesGraph"


def export_graphs(drv: Derivation, store: StoreDirectory, queries: Queries) -> dict[str, bytes]:
    """Return the contents of the files that DRV asks for, by name; may be long.

    :raises BuildFailure: the list is not of the right form (input rejected).
    :raises GuixdError: a file name that cannot be.
    """
    listed = drv.environment.get(VARIABLE, "")
    words = listed.split()
    if len(words) % 2:
        raise _rejected(f"is not made of pairs of a file and a path: `{listed}'")
    files = {}
    for name, text in zip(words[::2], words[1::2], strict=True):
        try:
            check_name(name)
        except BadName as error:
            raise GuixdError(f"`{VARIABLE}': {error.text}") from None
        try:
            item = store.containing(text)
        except NotInStore as error:
            raise _rejected(f"is wrong: {error.text}") from None
        if not queries.is_valid(item):
            raise _rejected(f"names the invalid path `{item}'")
        files[name] = _graph(item, queries)
    return files


def _rejected(why: str) -> BuildFailure:
    return BuildFailure(Status.INPUT_REJECTED, f"`{VARIABLE}' {why}")


def _graph(item: StorePath, queries: Queries) -> bytes:
    paths = set(queries.closure([item]))
    outputs: set[StorePath] = set()
    for path in paths:
        if path.is_derivation:
            outputs.update(queries.derivation_outputs(path).values())
    paths.update(queries.closure(outputs))
    pieces = []
    for path in sorted(paths):
        used = sorted(queries.path_info(path).references)
        pieces.append("\n".join([path, "", str(len(used)), *used]) + "\n")
    return "".join(pieces).encode()
