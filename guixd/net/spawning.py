"""Starting helper processes; without Twisted, which takes longer to load than a helper to start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping

import guixd
from guixd import descriptors

WATCHED = ("/etc/resolv.conf", "/etc/hosts")
"""Files of which the fetcher has a copy; when they change an idle one is replaced."""
_FETCHER = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from guixd.net.fetcher import main; main(int(sys.argv[1]))"
)
_KEPT_VARIABLES = ("PATH", "SSL_CERT_FILE", "LANG", "TZ")


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of what a `channel` needs."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


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


class StartedFetcher:
    """A fetcher that loads what it needs, or is ready.

    :ivar end: of the channel to it.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Start it.

        :raises OSError: it cannot be started.
        """
        self._resolver = _resolver_now()
        self.end, theirs = pair()
        kept = {name: environ[name] for name in _KEPT_VARIABLES if name in environ}
        with theirs:
            try:
                self.process = start_helper(_FETCHER, theirs, kept)
            except OSError:
                self.end.close()
                raise

    @property
    def outdated(self) -> bool:
        """Whether it does not know how this machine finds names now."""
        return self._resolver != _resolver_now()


def _resolver_now() -> object:
    """Return what differs when the files that name servers have changed."""
    return [_state(name) for name in WATCHED]


def _state(name: str) -> tuple[int, int] | None:
    try:
        status = os.stat(name)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
