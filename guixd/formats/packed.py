"""Reads and writes many short strings at once (spec: protocol §2).

To read, a loop over the lengths only cuts; what must be true of all strings is then tested on
the whole, by calls that do not depend on their number.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

_LONGEST = 255
_STEPS = [8 + size + (-size & 7) for size in range(_LONGEST + 1)]
MOST_BYTES = 8 + _LONGEST + 1
"""Most bytes that one short string takes, its length and padding included."""


def take_short(data: bytes, most: int) -> tuple[list[str], str, int]:
    """Read up to MOST strings at the beginning of DATA, as many as are whole.

    :return: the strings, the same with NULs between them, and how many bytes they
        take; nothing if one of them is empty, longer than 255 bytes, not ASCII, has a
        NUL, or is malformed.
    """
    found: list[str] = []
    text = data.decode("latin-1")
    here, end, steps, append = 0, len(data), _STEPS, found.append
    last = 0
    while most and here < end:
        size = data[here]
        last = here
        append(text[here + 8 : here + 8 + size])
        here += steps[size]
        most -= 1
    if here > end:
        del found[-1]
        here = last
    joined = "\0".join(found)
    separators = len(found) - 1
    # Without a NUL in them, all NULs are in the lengths, of which the first byte is none,
    # and in the padding.  If there are fewer, a length or the padding is wrong.
    if (
        not found
        or not all(found)
        or joined.count("\0") != separators
        or data.count(0, 0, here) != here - len(found) - (len(joined) - separators)
        or not joined.isascii()
    ):
        return [], "", 0
    return found, joined, here


def all_below(joined: str, count: int, directory: str) -> bool:
    """Whether COUNT texts, JOINED by NULs, are names of direct children of DIRECTORY."""
    joined = f"\0{joined}\0"
    prefix = f"\0{directory}/"
    return (
        joined.count(prefix) == count
        and joined.count("/") == count * prefix.count("/")
        and prefix + "\0" not in joined
    )


_BEFORE = [f"{chr(size)}\0\0\0\0\0\0\0" for size in range(_LONGEST + 1)]
_AFTER = ["\0" * (-size & 7) for size in range(_LONGEST + 1)]


def encode_short(texts: Collection[str]) -> bytes | None:
    """Write TEXTS as strings; `None` if one is not ASCII or longer than 255 bytes."""
    if not all(map(str.isascii, texts)):
        return None
    sizes = list(map(len, texts))
    if max(sizes, default=0) > _LONGEST:
        return None
    # No loop of ours: this takes a third of the time.
    before, after = map(_BEFORE.__getitem__, sizes), map(_AFTER.__getitem__, sizes)
    pieces = chain.from_iterable(zip(before, texts, after, strict=True))
    return "".join(pieces).encode("latin-1")
