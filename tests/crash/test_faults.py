"""Points at which a process kills itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

from guixd import faults
from tests.crash.points import points

_PROGRAM = """
from guixd.faults import reached
for number in range(4):
    reached("b.made")
    reached("a.made")
    print(number, flush=True)
"""


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

    def test_names(self) -> None:
        """Names have an area and a state."""
        self.assertIn("add.moved", points())
        for name in points():
            self.assertIsNotNone(re.fullmatch(r"[a-z]+\.[a-z]+", name), name)
