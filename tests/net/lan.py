"""Two machines with a network between them, as far as the kernel can tell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.sandbox import kernel
from tests.support import is_root, requires

_NEWNET = 0x40000000


def _available() -> bool:
    return is_root() and None not in map(shutil.which, ("ip", "nsenter", "unshare"))


@cache
def _has_cables() -> bool:
    command = ["unshare", "--net", "ip", "link", "add", "lan", "type", "veth"]
    return not _available() or subprocess.run(command, check=False).returncode == 0


def requires_lan(case: type) -> type:
    """Decorate a class whose tests need such machines, see `requires`."""
    case = requires(_available, "root and iproute2")(case)
    return requires(_has_cables, "network namespaces with veth", of_kernel=True)(case)


class Machine:
    """A network namespace, which ends with the test CASE.

    :ivar pid: a process in it.
    """

    def __init__(self, case: SynchronousTestCase) -> None:
        held = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        case.addCleanup(held.communicate)
        assert held.stdout is not None
        held.stdout.readline()  # It is in its namespace now.
        self.pid = held.pid
        self.ip("link", "set", "lo", "up")

    def command(self, *command: str) -> list[str]:
        """Return what runs COMMAND there."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *command]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let the calling thread be there, and so the processes that it starts."""
        own, other = Path("/proc/thread-self/ns/net"), Path(f"/proc/{self.pid}/ns/net")
        with own.open() as before, other.open() as there:
            kernel.setns(there.fileno(), _NEWNET)
            try:
                yield
            finally:
                kernel.setns(before.fileno(), _NEWNET)

    def ip(self, *arguments: str) -> None:
        """Configure it, see ip(8)."""
        subprocess.run(self.command("ip", *arguments), check=True)


def connect(one: Machine, other: Machine) -> None:
    """Put a cable between two machines, which get the addresses 10.9.0.1 and 10.9.0.2."""
    peer = ("peer", "name", "lan", "netns", str(other.pid))
    one.ip("link", "add", "lan", "type", "veth", *peer)
    for number, machine in enumerate((one, other), 1):
        machine.ip("address", "add", f"10.9.0.{number}/24", "dev", "lan")
        machine.ip("link", "set", "lan", "up")


def announce(case: SynchronousTestCase, machine: Machine, *arguments: str) -> Callable[[], None]:
    """Let MACHINE announce services; see `announcer` for ARGUMENTS.

    :return: what takes them back; else that is done when CASE ends.
    """
    command = machine.command(sys.executable, "-m", "tests.net.announcer", *arguments)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[2])

    def take_back() -> None:
        if process.stdin is not None and not process.stdin.closed:
            process.communicate()

    case.addCleanup(take_back)
    return take_back
