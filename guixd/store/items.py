"""What the store knows of an item."""

from __future__ import annotations

from dataclasses import dataclass

from guixd.formats.path import StorePath


@dataclass(frozen=True, slots=True)
class PathInfo:
    """A valid item."""

    path: StorePath
    nar_hash: bytes
    """The sha256 of the NAR, 32 bytes."""
    nar_size: int
    """Size of the NAR in bytes, 0 if unknown."""
    references: tuple[StorePath, ...] = ()
    """Sorted; itself may be among them."""
    registration_time: int = 0
    """Seconds since the epoch."""
    deriver: StorePath | None = None


@dataclass(frozen=True, slots=True)
class Registration:
    """An item whose files are in place and that is to become valid."""

    path: StorePath
    nar_hash: bytes
    nar_size: int
    references: frozenset[StorePath] = frozenset()
    deriver: StorePath | None = None
