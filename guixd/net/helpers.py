"""Processes of the daemon's own that do one thing for it, and how their end is noticed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import cast

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

import guixd
from guixd import descriptors


def search_path() -> list[str]:
    """Where helpers find modules: this very package first, and what the daemon trusts."""
    parent = os.path.dirname(os.path.dirname(os.path.abspath(guixd.__file__)))
    others = [entry for entry in sys.path if os.path.isabs(entry) and entry != parent]
    return [parent, *others]


def start_helper(
    boot: str, end: socket.socket, environ: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Run the Python text BOOT in a new process; its arguments are the descriptor of END and
    what `sys.path` should be.

    :param environ: all of its environment.
    :raises OSError: it cannot be started.
    """
    number = end.fileno()
    command = [sys.executable, "-I", "-X", "utf8", "-c", boot, str(number)]
    process = subprocess.Popen(
        [*command, *search_path()],
        stdin=subprocess.DEVNULL,
        pass_fds=(number,),
        cwd="/",
        env=dict(environ),
    )
    descriptors.give_back(process.pid)
    return process


@implementer(IReadDescriptor)
class Death:
    """Waits for the end of a process."""

    def __init__(self, reactor: IReactorFDSet, pid: int, ended: Callable[[], None]) -> None:
        self._reactor = reactor
        self._ended = ended
        self._descriptor = os.pidfd_open(pid)
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._descriptor

    def logPrefix(self) -> str:
        return "helper"

    def doRead(self) -> None:
        self.connectionLost(cast(Failure, None))
        self._ended()

    def connectionLost(self, reason: Failure) -> None:
        self._reactor.removeReader(self)
        os.close(self._descriptor)
        self._descriptor = -1
