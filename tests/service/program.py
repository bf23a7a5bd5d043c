"""A daemon in a process of its own, as the service manager starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.formats.messages import ANSWER, LAST, Greeting
from tests.support import temporary_directory

CHECKOUT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "guixd"]
TWISTD = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
PYTHONPATH = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
WAIT = 30
"""Seconds after which a program that hangs is killed, so that the test fails."""


class Program:
    """A running daemon, in a directory of its own."""

    def __init__(
        self, case: SynchronousTestCase, command: list[str], owner: int = -1, **more: str
    ) -> None:
        self.directory = temporary_directory(case, world_readable=True)
        os.chown(self.directory, owner, owner)
        os.mkdir(self.directory + "/tmp")
        self.socket = self.directory + "/var/daemon-socket/socket"
        self._ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ready.settimeout(WAIT)
        self._ready.bind(self.directory + "/notify")
        os.chmod(self.directory + "/notify", 0o666)
        case.addCleanup(self._ready.close)
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": PYTHONPATH,
            "NIX_STORE_DIR": self.directory + "/store",
            "GUIX_STATE_DIRECTORY": self.directory + "/var",
            "GUIX_LOG_DIRECTORY": self.directory + "/log",
            "GUIX_CONFIGURATION_DIRECTORY": self.directory + "/etc",
            "TMPDIR": self.directory + "/tmp",
            "NOTIFY_SOCKET": self.directory + "/notify",
            **more,
        }
        self._output = Path(self.directory, "output")
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                # Signals are ignored here if the tests have been started in the background.
                ["env", "--default-signal", *command],
                cwd="/proc",
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                umask=0o077,
            )
        case.addCleanup(self._end)

    def _end(self) -> None:
        self.process.kill()
        self.process.wait(WAIT)

    @property
    def output(self) -> str:
        """All that has been printed."""
        return self._output.read_text(errors="replace")

    def state(self) -> bytes:
        """Return the next thing that the daemon tells the service manager."""
        return self._ready.recv(1000)

    def greet(self) -> None:
        """Shake hands with the daemon."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(WAIT)
            client.connect(self.socket)
            client.sendall(Greeting().encode())
            answer = b""
            while LAST not in answer:
                part = client.recv(100)
                if not part:  # pytest would cut the text of an assert
                    raise AssertionError(answer)
                answer += part
            assert answer.startswith(ANSWER), answer

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return the exit status and all that was printed."""
        self.process.send_signal(number)
        return self.process.wait(WAIT), self.output
