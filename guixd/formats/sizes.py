"""Numbers of bytes as the user reads them (spec: store §9)."""

from __future__ import annotations

_UNITS = "KMGTPE"


def size_text(size: int) -> str:
    """Write SIZE, a number of bytes, in as many columns as others take."""
    if size <= 1 << 10:
        return f"{size:4d}  bytes"
    power = 0
    while power < len(_UNITS) - 1 and size > 1 << 10 * (power + 2):
        power += 1
    return f"{size / (1 << 10 * (power + 1)):7.2f} {_UNITS[power]}iB"


def short_size(size: int) -> str:
    """Write SIZE, a number of bytes, within a line."""
    return " ".join(size_text(size).split())
