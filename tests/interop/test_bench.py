"""The benchmark runs, and its checks of what the daemon answers hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import requires_guest
from tests.interop.place import CHECKOUT
from tests.support import temporary_directory


@requires_guest
class Benchmark(SynchronousTestCase):
    """A run that is too small to say anything about speed."""

    def test_run(self) -> None:
        """Every workload gets right answers from guixd."""
        directory = Path(temporary_directory(self, world_readable=True))
        results = directory / "results.md"
        run = subprocess.run(
            [
                sys.executable, str(CHECKOUT / "bench/run.py"), "--alone", "--scale=0.004",
                "--repetitions=1", "--size=1", f"--directory={directory}", f"--results={results}",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        self.assertEqual(run.stderr, "")
        self.assertEqual(run.returncode, 0)
        self.assertNotIn("failed", run.stdout)
        self.assertIn("| W7 log of ordinary lines |", results.read_text())
