"""What a client asks to be built, and under which options."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from guixd.formats.path import StorePath
from guixd.settings import Settings


class Roots(Protocol):
    """The temporary roots of a session; they last as long as the session (spec: gc §4)."""

    def add(self, path: StorePath, /) -> object:
        """Protect PATH; returns nothing of interest, or raises `store.roots.Busy`."""


class BuildMode(IntEnum):
    """What to do with outputs that are valid already (values of the wire)."""

    NORMAL = 0
    REPAIR = 1
    CHECK = 2


class Level(IntEnum):
    """Levels of log lines, the most important first (spec: protocol §6)."""

    ERROR = 0
    INFO = 1
    TALKATIVE = 2
    CHATTY = 3
    DEBUG = 4
    VOMIT = 5


@dataclass(frozen=True, slots=True)
class Wanted:
    """An item that the client names: a derivation's outputs, or a path to substitute."""

    path: StorePath
    outputs: frozenset[str] | None = None
    """Names of the wanted outputs; `None` for all."""
    itself: bool = False
    """Whether a derivation is wanted itself, not its outputs."""

    @property
    def is_build(self) -> bool:
        """Whether it is about the outputs of a derivation."""
        return self.path.is_derivation and not self.itself


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """The options of one client that its builds obey; times in seconds, 0 for none."""

    keep_failed: bool = False
    keep_going: bool = False
    fallback: bool = False
    max_jobs: int = 1
    cores: int = 0
    timeout: int = 86400
    max_silent_time: int = 3600
    max_log_size: int = 0
    rounds: int = 1
    use_substitutes: bool = True
    substitute_urls: tuple[str, ...] = ()
    """Servers, the preferred ones first."""
    discover: bool = False
    """Whether servers found in the local network come before these."""
    follow_downloads: bool = False
    """Whether the client follows downloads by their traces."""
    offload: bool = True
    deduplicate: bool = True
    client_uid: int | None = None
    """Owner of kept build trees; `None` without peer credentials."""
    client_gid: int | None = None
    settings: Settings | None = None
    """What counts instead of the daemon's settings, where a trusted client says so."""

    @property
    def may_substitute(self) -> bool:
        """Whether there is any place to look for substitutes, and it is wanted."""
        return self.use_substitutes and bool(self.substitute_urls or self.discover)


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """One request of one client."""

    wanted: tuple[Wanted, ...]
    mode: BuildMode = BuildMode.NORMAL
    options: ClientOptions = ClientOptions()
    roots: Roots | None = None
    """Where derivations and outputs are protected; `None` lets the builder use its own."""
