"""What several tests need: a place of their own, and what they require of the machine."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from twisted.trial.unittest import SkipTest, SynchronousTestCase

_Test = TypeVar("_Test", bound=type)


def in_ci() -> bool:
    """Whether a test that cannot run is a failure (CI=true)."""
    return os.environ.get("CI") == "true"


def require(condition: bool, what: str, *, of_kernel: bool = False) -> None:
    """Skip the running test unless CONDITION; in CI fail instead.

    A second run without privileges, after one as root, sets GUIXD_TESTED_AS_ROOT.

    :param of_kernel: whether the machine's kernel must have it, which CI cannot choose.

    :param what: what is missing, such as "root".
    """
    if not condition:
        tested_elsewhere = "root" in what and "GUIXD_TESTED_AS_ROOT" in os.environ
        if in_ci() and not tested_elsewhere and not of_kernel:
            raise AssertionError(f"CI must provide: {what}")
        raise SkipTest(f"needs {what}")


def requires(
    check: Callable[[], bool], what: str, *, of_kernel: bool = False
) -> Callable[[_Test], _Test]:
    """Return a class decorator: each test is skipped, or fails in CI, unless CHECK().

    :param of_kernel: see `require`.
    """

    def decorate(case: _Test) -> _Test:
        original = case.setUp

        def set_up(self: SynchronousTestCase) -> object:
            require(check(), what, of_kernel=of_kernel)
            return original(self)

        case.setUp = set_up
        return case

    return decorate


def is_root() -> bool:
    """Whether tests may use build users, mounts and foreign ids."""
    return os.geteuid() == 0


@cache
def has_user_namespaces() -> bool:
    """Whether an unprivileged process can make a user namespace with mounts here."""
    script = (
        "import ctypes,os,sys\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "libc = ctypes.CDLL(None)\n"
        "sys.exit(libc.unshare(0x10000000 | 0x00020000) != 0)\n"
    )
    return subprocess.run([sys.executable, "-I", "-c", script], check=False).returncode == 0


requires_root = requires(is_root, "root")
requires_user_namespaces = requires(has_user_namespaces, "unprivileged user namespaces")


def open_files() -> int:
    """Return how many descriptors this process has, without those of garbage."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def open_names() -> set[str]:
    """Return the names of what this process, with all its threads, has open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return found


def processes_of(uids: Container[int]) -> list[str]:
    """Return the processes of UIDS, without those that have ended but were not reaped."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):  # It has ended.
            process = Path("/proc", name)
            state = process.joinpath("stat").read_text().rpartition(")")[2].split()[0]
            if process.stat().st_uid in uids and state != "Z":
                found.append(name)
    return found


@contextmanager
def last_descriptor(*, free: bool) -> Iterator[None]:
    """Let this process open one file more if FREE, else none."""
    next_one = os.dup(0)
    os.close(next_one)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def make_deep(
    directory: str, name: str, levels: int, inside: Callable[[int, int], object] | None = None
) -> None:
    """Make NAME in DIRECTORY, NAME in that, and so on, deeper than names can be long.

    :param inside: called with the level, from 0, and a descriptor of what gets the next NAME.
    """
    fd = os.open(directory, os.O_RDONLY)
    for level in range(levels):
        if inside is not None:
            inside(level, fd)
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def temporary_directory(case: SynchronousTestCase, *, world_readable: bool = False) -> str:
    """Return a fresh directory that is removed when the test CASE ends."""
    directory = os.path.realpath(tempfile.mkdtemp(prefix="guixd-test-"))
    if world_readable:
        os.chmod(directory, 0o755)
    case.addCleanup(
        subprocess.run,
        ["sh", "-c", 'chmod -R u+rwX "$1"; rm -rf "$1"', "sh", directory],
        check=False,
        stderr=subprocess.DEVNULL,
    )
    return directory


class DirectoryTestCase(SynchronousTestCase):
    """A test with a directory of its own, opened."""

    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        self.addCleanup(os.close, self.fd)

    def at(self, name: str) -> str:
        return f"{self.directory}/{name}"
