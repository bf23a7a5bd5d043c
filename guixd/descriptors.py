"""How many files the daemon may have open, and how many its helpers (getrlimit(2))."""

from __future__ import annotations

import resource

_given: list[int] = []
"""The soft limit with which the daemon was started, if it is another now."""


def allow_many() -> None:
    """Let this process open as many files as it may, as each client takes some.

    The soft limit is low for the sake of programs that use select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        _given[:] = [soft]


def give_back(pid: int) -> None:
    """Let the process PID, and the builders that it starts, have the limit from before."""
    for soft in _given:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
