"""The options of `guix build` that say how, beside the stock daemon (spec: build §5, §6)."""

from __future__ import annotations

import os
import re

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import PLAIN_USER, requires_guest
from tests.interop.place import GUIXD, STOCK, Facts, Output, Place


def told(output: Output) -> list[str]:
    """Return what a user reads, without what differs from one run to the next."""
    text = output.out + output.err
    text = re.sub(r"\b[0-9a-f]{64}\b|\d+\.\d+|\d+ MiB", "N", text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@requires_guest
class Modes(SynchronousTestCase):
    """Each command runs on both daemons, on stores with the same derivations."""

    maxDiff = None

    def setUp(self) -> None:
        self.places: dict[str, Place] = {}
        self.derivations: Facts = Facts("")
        for daemon in STOCK, GUIXD:
            place = self.places[daemon] = Place(self)
            place.start(daemon)
            self.derivations = place.scheme("modes.scm")

    def both(
        self, *arguments: str, status: int | None = 0, user: int | None = None
    ) -> dict[str, Output]:
        """Run `guix build` with ARGUMENTS, in which names stand for derivations, on both."""
        command = ["guix", "build", "--no-offload", "--verbosity=3"]
        for argument in arguments:
            known = argument in self.derivations
            command.append(self.derivations.text(argument) if known else argument)
        return {
            daemon: place.run(*command, status=status, user=user)
            for daemon, place in self.places.items()
        }

    def same(self, *arguments: str, status: int = 0) -> Output:
        """Run it; all that the user reads must be the same."""
        shown = self.both(*arguments, status=status)
        self.assertEqual(told(shown[STOCK]), told(shown[GUIXD]))
        return shown[GUIXD]

    def test_check(self) -> None:
        """B15, D24: the same again; and something else, which is kept if that is wanted."""
        self.same("fixed")
        self.same("fixed", "--check")
        self.same("random")
        shown = self.both("random", "--check", status=1)
        for output in shown.values():
            self.assertIn("may not be deterministic", output.err)
        shown = self.both("random", "--check", "--keep-failed", status=1)
        for daemon, output in shown.items():
            (kept,) = re.findall(r"/gnu/store/[a-z0-9]+-random-check", output.err)[:1]
            self.assertTrue(self.places[daemon].outside(kept).exists())
        for output in self.both("works", "--check", status=1).values():
            self.assertRegex(output.err, "missing|not there|not valid")

    def test_rounds(self) -> None:
        """B14: several rounds; what differs between them is no output."""
        self.both("fixed", "--rounds=3")
        for daemon, output in self.both("random", "--rounds=2", status=1).items():
            self.assertIn("differs from previous round", output.err, daemon + output.err)

    def test_keep_failed(self) -> None:
        """X23: the tree of a failed build is the client's."""
        for daemon, output in self.both("fails", "-K", status=1, user=PLAIN_USER).items():
            self.assertIn("it is written", output.out + output.err)
            self.assertIn("failed with exit code 3", output.err)
            (kept,) = re.findall(r"keeping build directory `([^']+)'", output.err)
            self.assertIn("guix-build-fails.drv-0", kept)
            tree = self.places[daemon].directory / "build" / os.path.basename(kept)
            self.assertEqual((tree / "left").read_text(), "left\n")
            self.assertEqual(os.stat(tree).st_uid, PLAIN_USER)

    def test_keep_going(self) -> None:
        """B3, P31: with `-k` what can be built is built."""
        for daemon, output in self.both("fails", "works", "-k", status=1).items():
            self.assertIn("fails.drv", output.err)
            valid = self.places[daemon].run("guix", "gc", "--list-dead").out
            self.assertRegex(valid, "-works\n")

    def test_limits(self) -> None:
        """B11, O16: builds that take too long, or say nothing for too long."""
        for output in self.both("loops", "--timeout=1", status=1).values():
            self.assertRegex(output.err, "timed out|timeout")
        for output in self.both("silent", "--max-silent-time=1", status=1).values():
            self.assertRegex(output.err, "silent|silence|timed out")

    def test_cores(self) -> None:
        """O15: what the builder is told of cores."""
        for daemon, output in self.both("cores", "--cores=3").items():
            built = self.places[daemon].outside(output.lines[-1])
            self.assertEqual(built.read_text(), "3\n")
