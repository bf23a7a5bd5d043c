"""Points at which a process kills itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd import faults
from guixd.formats import operations as op
from guixd.formats.path import StoreDirectory
from tests.crash.points import points
from tests.load.peer import Ended, Peer
from tests.service.program import PROGRAM, WAIT, Program

_PROGRAM = """
from guixd.faults import reached
for number in range(4):
    reached("b.made")
    reached("a.made")
    print(number, flush=True)
"""

_PLACES = ("NIX_STORE_DIR", "GUIX_STATE_DIRECTORY", "GUIX_LOG_DIRECTORY")


def run(fault: str) -> tuple[int, str]:
    """Return the status and the output of a program that passes two points four times."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**os.environ, faults.VARIABLE: fault},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


class FaultTests(SynchronousTestCase):
    def test_unused(self) -> None:
        """Without the variable nothing is done."""
        self.assertNotIn(faults.VARIABLE, os.environ)
        self.assertIsNone(faults.fault)
        self.assertIsNone(faults.reached("a.made"))

    def test_killed(self) -> None:
        """The process dies when the point is reached for the wanted time."""
        self.assertEqual(run("a.made"), (-signal.SIGKILL, ""))
        self.assertEqual(run("a.made:3"), (-signal.SIGKILL, "0\n1\n"))
        self.assertEqual(run("a.made:5"), (0, "0\n1\n2\n3\n"))
        self.assertEqual(run("c.made"), (0, "0\n1\n2\n3\n"))
        self.assertEqual(run(""), (0, "0\n1\n2\n3\n"))

    def test_daemon(self) -> None:
        """A daemon whose environment says so dies where it says, and the next one goes on."""
        request = op.AddTextToStore("text", b"text", ())
        first = Program(self, PROGRAM, **{faults.VARIABLE: "text.written"})
        first.state()
        client = Peer(first.socket, StoreDirectory(first.directory + "/store"))
        self.addCleanup(client.close)
        client.greet()
        self.assertRaises((Ended, ConnectionError), client.ask, request)
        self.assertEqual(first.process.wait(WAIT), -signal.SIGKILL)
        again = {name: first.environment[name] for name in _PLACES}
        second = Program(self, PROGRAM, **again)
        second.state()
        client = Peer(first.socket, StoreDirectory(first.directory + "/store"))
        self.addCleanup(client.close)
        client.greet()
        path = client.ask(request)
        self.assertEqual(Path(path).read_bytes(), b"text")
        self.assertEqual(second.end()[0], 0)

    def test_names(self) -> None:
        """Names have an area and a state."""
        self.assertIn("add.moved", points())
        for name in points():
            self.assertIsNotNone(re.fullmatch(r"[a-z]+\.[a-z]+", name), name)
