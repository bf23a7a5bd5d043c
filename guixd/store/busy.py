"""Roots that running processes are: what they run, hold open or name (spec: gc §5)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NAME = rb"/[0-9a-z]{32}-[a-zA-Z0-9._+?=-]+"


def busy_names(store: str, processes: str = "/proc") -> set[str]:
    """Return the base names below STORE that processes use, valid or not; for a thread.

    What may not be read, as it belongs to others, is passed over: only root sees all.

    :param processes: where the kernel shows the processes.
    """
    prefix = os.fsencode(store) + b"/"
    pattern = re.compile(re.escape(os.fsencode(store)) + _NAME)
    found: set[bytes] = set()
    with os.scandir(processes) as entries:
        directories = [entry.path for entry in entries if entry.name.isdigit()]
    for directory in directories:
        # A process may end at any moment, and others' may be closed to us.
        for text in _links(directory):
            if text.startswith(prefix):
                found.add(text[len(prefix) :].split(b"/", 1)[0])
        with suppress(OSError):
            for line in Path(directory, "maps").read_bytes().splitlines():
                _, separator, rest = line.partition(prefix)
                if separator:
                    found.add(rest.split(b"/", 1)[0])
        with suppress(OSError):
            for match in pattern.findall(Path(directory, "environ").read_bytes()):
                found.add(match[len(prefix) :])
    return {os.fsdecode(name) for name in found if name}


def _links(directory: str) -> Iterator[bytes]:
    """Give what the links of a process lead to: its program, directory and open files."""
    names = [f"{directory}/exe", f"{directory}/cwd"]
    with suppress(OSError):
        names += [f"{directory}/fd/{number}" for number in os.listdir(f"{directory}/fd")]
    for name in names:
        with suppress(OSError):
            yield os.fsencode(os.readlink(name))
