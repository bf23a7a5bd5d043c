"""Builders that the daemon provides itself (derivations.md §9)."""

from __future__ import annotations

from guixd.build.results import BuildFailure, Status
from guixd.formats.derivation import Derivation

PREFIX = "builtin:"
NAMES = ("download", "git-download")


def is_builtin(drv: Derivation) -> bool:
    """Whether the builder of DRV is one of the daemon's."""
    return drv.builder.startswith(PREFIX)


def refuse_builtin(drv: Derivation) -> None:
    """End a build whose builder is not there.

    :raises BuildFailure: always: unknown ones fail for good, known ones for now.
    """
    name = drv.builder.removeprefix(PREFIX)
    if name in NAMES:
        raise BuildFailure(
            Status.MISC_FAILURE, f"builder `{drv.builder}' is not supported yet", general=True
        )
    raise BuildFailure(Status.PERMANENT_FAILURE, f"there is no builtin builder `{name}'")
