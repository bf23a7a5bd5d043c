"""Failures that are remembered, repaired, or of one client only, by the real client."""

from __future__ import annotations

import re
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, VERIFIED, Facts, Output, Place
from tests.interop.test_sharing import read_until

ERROR = re.compile(r"(?m)^guix \w+: error: .*$")


class Bench:
    """A store with the derivations of modes.scm, and a daemon."""

    def __init__(self, case: SynchronousTestCase, daemon: str, *options: str) -> None:
        self.place = Place(case)
        self.place.start(daemon, *options)
        self.derivations: Facts = self.place.scheme("modes.scm")

    def command(self, *arguments: str) -> list[str]:
        """Return `guix build` with ARGUMENTS, in which names stand for derivations."""
        known = self.derivations
        words = [known.text(word) if word in known else word for word in arguments]
        return ["guix", "build", "--no-offload", "--verbosity=3", *words]

    def build(self, *arguments: str, status: int = 0) -> Output:
        return self.place.run(*self.command(*arguments), status=status)

    def gc(self, *arguments: str, status: int | None = 0) -> list[str]:
        output = self.place.run("guix", "gc", *arguments, status=status)
        return [*output.lines, *output.err.splitlines()]

    def built(self, name: str) -> Path:
        """Return the output of NAME, which is built, on this machine."""
        return self.place.outside(self.build(name).lines[-1])


@requires_guest
class FailureTests(SynchronousTestCase):
    """With either daemon, and the same to read."""

    maxDiff = None

    def test_remembered(self) -> None:
        """B28, P24: `--cache-failures`: nothing is tried again until the failure is cleared."""
        seen = []
        for daemon in STOCK, GUIXD:
            bench = Bench(self, daemon, "--cache-failures")
            first = bench.build("fails", status=1)
            self.assertIn("it is written", first.out + first.err)
            again = bench.build("fails", status=1)
            self.assertNotIn("it is written", again.out + again.err)
            failures = bench.gc("--list-failures")
            self.assertRegex(failures[0], r"^/gnu/store/\w{32}-fails$")
            cleared = bench.gc("--clear-failures", *failures)
            self.assertEqual(bench.gc("--list-failures"), [])
            third = bench.build("fails", status=1)
            self.assertIn("it is written", third.out + third.err)
            errors = [ERROR.findall(output.err) for output in (first, again, third)]
            seen.append([failures, cleared, errors])
            bench.place.stop()
        self.assertEqual(*seen)

    def test_told(self) -> None:
        """B29, P24: who lets guix hide the logs of builds reads the end of one that failed."""
        bench = Bench(self, GUIXD)
        output = bench.build("fails", "--verbosity=1", status=1)
        said = output.out + output.err
        self.assertIn("the last lines of its log:\n  > it is written\n", said)
        self.assertEqual(said.count("/var/log/guix/drvs/"), 1, said)  # guix says where it is

    def test_repair(self) -> None:
        """B16, P18: a damaged output, or what it refers to, is made again by its derivation."""
        for daemon in STOCK, GUIXD:
            bench = Bench(self, daemon)
            needs, works = bench.built("needs"), bench.built("works")
            right = {file: file.read_text() for file in (needs, works)}
            for options, damaged in (
                (("build", "--repair"), [needs]),
                (("gc", "--verify=contents,repair"), [needs, works]),
                (("build", "--repair"), [works]),
            ):
                for file in damaged:
                    file.chmod(0o644)
                    file.write_text("other\n")
                    file.chmod(0o444)
                if options[0] == "build":
                    bench.build("--repair", "needs")
                else:
                    bench.gc(*options[1:], status=None)
                for file, text in right.items():
                    self.assertEqual(file.read_text(), text, (daemon, options))
                self.assertEqual(bench.gc("--verify=contents"), VERIFIED)
            bench.place.stop()

    def test_two_clients(self) -> None:
        """B40: what is wrong with the machine for one client's build is nothing to another's."""
        seen = []
        for daemon in STOCK, GUIXD:
            bench = Bench(self, daemon)
            other = bench.place.client(*bench.command("paced", "works"))
            begun = read_until(other, "begun", errors=True)
            broken = bench.build("fifo", "paced", "--max-jobs=2", status=1)
            self.assertIn("unsupported type", broken.err)
            leaving = bench.place.client(*bench.command("silent", "random"))
            read_until(leaving, "building ", errors=True)
            leaving.kill()
            leaving.communicate()
            ended = bench.place.finish(other)
            self.assertIn("ended", begun + ended.err + ended.out)
            seen.append(sorted(ended.lines))
            self.assertEqual(len(seen[-1]), 2)
            bench.place.stop()
        self.assertEqual(*seen)
