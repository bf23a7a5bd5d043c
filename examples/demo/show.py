"""What the demo prints: builders' lines as they come, then a summary."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

_COLOURS = (36, 33, 32, 35)


def heading(text: str) -> None:
    """Print a line that begins a part."""
    say(f"\n\x1b[1m{text}\x1b[0m" if _coloured() else f"\n{text}")


def say(text: str = "") -> None:
    """Print a line at once."""
    print(text, flush=True)


def _coloured() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ


@dataclass
class Step:
    """What a builder told of itself."""

    who: dict[str, str] = field(default_factory=dict)
    namespaces: dict[str, str] = field(default_factory=dict)
    succeeded: bool = False


class BuildLog:
    """Reads the daemon's messages: trace lines, and the output of several builders at once.

    :ivar steps: what was built, by the derivation's name.
    """

    def __init__(self) -> None:
        self.steps: dict[str, Step] = {}
        self._names: dict[int, str] = {}
        self._partial: dict[int, bytes] = {}

    def message(self, data: bytes) -> None:
        """Take one message of the daemon, as it was sent."""
        if data.startswith(b"@ build-log "):
            header, _, output = data.partition(b"\n")
            pid = int(header.split()[2])
            *lines, self._partial[pid] = (self._partial.get(pid, b"") + output).split(b"\n")
            for line in lines:
                self._output(self._names.get(pid, str(pid)), line.decode(errors="replace"))
        elif data.startswith(b"@ "):
            self._trace(data.decode(errors="replace").rstrip("\n").split(" "))
        else:
            say("  " + data.decode(errors="replace").rstrip("\n"))

    def _trace(self, words: list[str]) -> None:
        if words[1] == "build-started":
            name = _name(words[2])
            self._names[int(words[-1])] = name
            self.steps.setdefault(name, Step())
            self._line(name, "started")
        elif words[1] == "build-succeeded":
            self.steps[_name(words[2])].succeeded = True
            self._line(_name(words[2]), "done")
        elif words[1] == "build-failed":
            self._line(_name(words[2]), "FAILED " + " ".join(words[4:]))

    def _output(self, name: str, line: str) -> None:
        step = self.steps.setdefault(name, Step())
        if line.startswith("who: "):
            step.who = dict(word.split("=") for word in line.split()[1:])
        elif line.startswith("namespace: "):
            kind, _, _ = line.removeprefix("namespace: ").partition(":")
            step.namespaces[kind] = line.removeprefix("namespace: ")
        else:
            self._line(name, "| " + line)

    def _line(self, name: str, text: str) -> None:
        if _coloured():
            colour = _COLOURS[sorted(self.steps).index(name) % len(_COLOURS)]
            say(f"  \x1b[{colour}m{name:>8}\x1b[0m {text}")
        else:
            say(f"  {name:>8} {text}")


def _name(derivation: str) -> str:
    return derivation.rpartition("/")[2][33:].removesuffix(".drv")


def summary(steps: dict[str, Step], ours: dict[str, str]) -> None:
    """Print who ran each step, and which of its namespaces were its own and not OURS."""
    for name, step in steps.items():
        own = sorted(k for k, ns in step.namespaces.items() if ns != ours.get(k))
        shared = sorted(set(step.namespaces) - set(own))
        who = step.who
        user = os.geteuid()
        outside = f" (outside: {user}, you)" if user and "user" in own else ""
        say(f"  {name:>8}  user {who['uid']}, group {who['gid']}{outside}, process {who['pid']}")
        say(f"            own namespaces: {' '.join(own) or 'none'}")
        say(f"            {'  '.join(step.namespaces[kind] for kind in own)}")
        say(f"            the host's: {' '.join(shared) or 'none'}")
