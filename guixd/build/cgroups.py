"""Limits of memory, processes and processor time of each build, by cgroup v2.

The daemon needs a part of the tree that is its own (with systemd: `Delegate=yes`).  In
it, the daemon's processes move to one leaf and each build gets another, as only leaves
may have processes.  Everything here is a few short writes to the kernel; only `end`
waits, for the processes that it kills, and so is for a thread.
"""

from __future__ import annotations

import itertools
import os
import select
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from guixd.settings import BuildLimits

_OWN = "guixd-daemon"
_BUILD = "guixd-build-"
_DEATH = 10_000
"""Milliseconds after which killed processes that do not end are left to the kernel."""


class Unavailable(Exception):
    """Builds cannot be limited here; the text says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """A cgroup of version 2: its directory, and whether that is the root of what we see."""

    directory: str
    is_root: bool


def own_place(process: str = "/proc/self") -> Place:
    """Return the cgroup of PROCESS.

    :raises Unavailable: there is none.
    """
    name = None
    for line in _read(f"{process}/cgroup").splitlines():
        if line.startswith("0::"):
            name = line[3:]
    for line in _read(f"{process}/mountinfo").splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 ") and name is not None:
            root, mounted = fields.split()[3:5]
            beneath = name if root == "/" else name.removeprefix(root)
            return Place((mounted + beneath).rstrip("/"), beneath in ("", "/"))
    raise Unavailable("no control groups of version 2 are mounted")


class Cgroups:
    """Where builds get their groups.

    :param place: our part of the tree.
    """

    def __init__(self, limits: BuildLimits, place: Place) -> None:
        """Take possession of PLACE.

        :raises Unavailable: it does not belong to us, or has not what LIMITS need.
        """
        self._limits = limits
        self._top = place.directory
        self._numbers = itertools.count(1)
        wanted = [name for name, on in _controllers(limits) if on]
        missing = set(wanted) - set(_read(f"{self._top}/cgroup.controllers").split())
        if missing:
            names = ", ".join(sorted(missing))
            raise Unavailable(f"the controllers {names} are not available in '{self._top}'")
        try:
            self._remove_old()
            if not place.is_root:
                self._make_room()
            _write(f"{self._top}/cgroup.subtree_control", " ".join(f"+{each}" for each in wanted))
        except OSError as error:
            raise Unavailable(f"'{self._top}' is not delegated: {error.strerror}") from error

    def _remove_old(self) -> None:
        """Remove the groups of a daemon that was killed."""
        for name in os.listdir(self._top):
            if name.startswith(_BUILD):
                Group(f"{self._top}/{name}", self._limits).end()

    def _make_room(self) -> None:
        own = f"{self._top}/{_OWN}"
        os.makedirs(own, exist_ok=True)
        for pid in _read(f"{self._top}/cgroup.procs").split():
            if _is_ours(int(pid)):
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    _write(f"{own}/cgroup.procs", pid)

    def begin(self) -> Group:
        """Make a group for a build.

        :raises OSError: it cannot be made; nothing is left then.
        """
        group = Group(f"{self._top}/{_BUILD}{os.getpid()}-{next(self._numbers)}", self._limits)
        os.mkdir(group.directory)
        try:
            group.limit()
        except BaseException:
            os.rmdir(group.directory)
            raise
        return group


@dataclass(slots=True, eq=False)
class Group:
    """The group of one build; it ends with `end`."""

    directory: str
    limits: BuildLimits

    def limit(self) -> None:
        """Write the limits."""
        limits = self.limits
        if limits.memory:
            self._set("memory.max", str(limits.memory))
            self._set("memory.oom.group", "1")
            with suppress(FileNotFoundError):  # without swap
                self._set("memory.swap.max", "0")
        if limits.processes:
            self._set("pids.max", str(limits.processes))
        if limits.cpu_weight:
            self._set("cpu.weight", str(limits.cpu_weight))

    def _set(self, name: str, value: str) -> None:
        _write(f"{self.directory}/{name}", value)

    def _count(self, file: str, word: str) -> int:
        try:
            lines = _read(f"{self.directory}/{file}").splitlines()
        except OSError:
            return 0
        return sum(int(line.split()[1]) for line in lines if line.startswith(word + " "))

    def verdict(self) -> str:
        """Return which limit a build met that failed; empty if none."""
        limits = self.limits
        if self._count("memory.events", "oom_kill"):
            return (
                f"it was killed as it needed more memory than the {limits.memory} bytes that"
                " the daemon's option '--build-memory' gives a build"
            )
        if self._count("pids.events", "max"):
            return (
                f"it could not start more than the {limits.processes} processes that the"
                " daemon's option '--build-processes' allows"
            )
        return ""

    def end(self) -> None:
        """Kill all processes of the group and remove it; blocks until they are dead."""
        try:
            with open(f"{self.directory}/cgroup.events") as events:  # noqa: PTH123
                with suppress(FileNotFoundError):  # before Linux 5.14
                    self._set("cgroup.kill", "1")
                poll = select.poll()
                poll.register(events, select.POLLPRI)
                while "populated 1" in events.read():
                    if not poll.poll(_DEATH):
                        break
                    events.seek(0)
            os.rmdir(self.directory)
        except FileNotFoundError:
            pass


def _controllers(limits: BuildLimits) -> Sequence[tuple[str, int]]:
    return ("memory", limits.memory), ("pids", limits.processes), ("cpu", limits.cpu_weight)


def _read(file: str) -> str:
    with open(file) as opened:  # noqa: PTH123
        return opened.read()


def _write(file: str, text: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _is_ours(pid: int) -> bool:
    """Whether PID is this process or one that it, or a child of it, has started."""
    while pid > 1 and pid != os.getpid():
        try:
            pid = int(_read(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])
        except OSError:
            return False
    return pid == os.getpid()
