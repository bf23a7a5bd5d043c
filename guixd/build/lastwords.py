"""The end of what a builder wrote, for a message about its failure."""

from __future__ import annotations

import re

MOST_LINES = 10
LONGEST = 300
"""Characters of a line."""
_LOOK = 16 << 10
"""Bytes at the end that are looked at."""
_COLOUR = re.compile(r"\x1b\[[0-9;:?]*[A-Za-z]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def last_lines(log: bytes | bytearray) -> tuple[str, ...]:
    """Return the last lines of LOG that are not blank, as a terminal can show them.

    Of a line that was written over, as progress bars are, the last state counts.
    """
    text = bytes(log[-_LOOK:]).decode("utf-8", "replace")
    lines = []
    for line in reversed(text.split("\n")):
        shown = _CONTROL.sub("\ufffd", _COLOUR.sub("", line.rstrip().rpartition("\r")[2]))
        if shown.strip():
            lines.append(shown if len(shown) <= LONGEST else shown[:LONGEST] + "…")
            if len(lines) == MOST_LINES:
                break
    return tuple(reversed(lines))
