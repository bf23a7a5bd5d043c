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


@dataclass(frozen=True, slots=True)
class Row:
    """A valid item as the database has it, be it well-formed or not."""

    path: StorePath
    hash_text: str
    """`sha256:` and 64 hexadecimal digits, all of them 0 if the hash is unknown."""
    nar_size: int
    """In bytes, 0 if unknown."""
