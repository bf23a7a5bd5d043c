"""The tools of the stock Guix say the same on guixd as on the stock daemon."""

from __future__ import annotations

import gzip
import re

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import PLAIN_USER, requires_guest
from tests.interop.place import GUIXD, STOCK, Facts, Output, Place

_QUIET = ("--no-grafts", "--no-substitutes", "--no-offload")


class Bench:
    """A place with the derivations of derivations.scm registered, and `guix build`."""

    def __init__(self, case: SynchronousTestCase, daemon: str) -> None:
        self.place = Place(case)
        self.place.start(daemon)
        self.facts: Facts = self.place.scheme("derivations.scm")

    def build(self, *arguments: str, status: int | None = 0, user: int | None = None) -> Output:
        """Run `guix build` on ARGUMENTS; names of derivations stand for their files."""
        words = [self.facts.text(word) if word in self.facts else word for word in arguments]
        return self.place.run("guix", "build", *_QUIET, *words, status=status, user=user)

    def gc(self, *arguments: str) -> list[str]:
        """Return the lines of `guix gc` on ARGUMENTS."""
        words = [self.facts.text(word) if word in self.facts else word for word in arguments]
        return self.place.run("guix", "gc", *words).lines


@requires_guest
class Tools(SynchronousTestCase):
    """`guix build`, `guix gc` and `guix hash`."""

    def both(self) -> list[Bench]:
        return [Bench(self, STOCK), Bench(self, GUIXD)]

    def test_queries(self) -> None:
        """B29, P9: what is printed about built items is the same word by word."""
        answers = []
        for bench in self.both():
            out = bench.facts.text("user out")
            answer = [bench.build("user").lines]
            answer += [
                bench.gc(question, "user out", "fine out")
                for question in ("--references", "--referrers", "--requisites", "--derivers")
            ]
            answer.append(bench.gc("--references", "user"))
            answer.append(bench.build("--log-file", "user").lines)
            answer.append(bench.build("--log-file", "fine out").lines)
            log = bench.place.directory / "log" / answer[-1][0].removeprefix("/var/log/guix/")
            answer.append([gzip.decompress(log.read_bytes()).decode()])
            answer.append(bench.build("--root=/var/guix/root", "user").lines)
            roots = bench.gc("--list-roots")
            answer.append(roots)
            fine = bench.place.outside(bench.facts.text("fine out"))
            digest = bench.place.run("guix", "hash", "-S", "nar", "-x", str(fine)).lines
            answer.append(digest)
            bench.place.stop()
            answers.append(answer)
            self.assertEqual(answer[0], [out])
            self.assertEqual(answer[8], ["being fine\n"])
            self.assertIn("/var/guix/root", roots)
        self.assertEqual(*answers)

    def test_failure(self) -> None:
        """P24: exit status and text that a person sees when a builder fails."""
        seen = []
        for bench in self.both():
            output = bench.build("broken", status=1)
            self.assertIn("about to fail", output.err)
            self.assertIn("View build log at '/var/log/guix/drvs/", output.err)
            seen.append(re.findall(r"(?m)^(?:guix build: error: |build of ).*", output.err))
        self.assertEqual(*seen)
        self.assertTrue(seen[1])

    def test_keep_going(self) -> None:
        """P31, B3: the others are built, and all that failed are named."""
        seen = []
        for bench in self.both():
            output = bench.build("--keep-going", "broken", "user", "broken too", status=1)
            self.assertTrue(bench.place.outside(bench.facts.text("user out")).exists())
            seen.append(re.findall(r"(?m)^guix build: error: .*", output.err))
            self.assertTrue(
                all(bench.facts.text(b) in seen[-1][0] for b in ("broken", "broken too"))
            )
        self.assertEqual(*seen)

    def test_timeout(self) -> None:
        """B11: `--timeout` ends an endless builder."""
        seen = []
        for bench in self.both():
            output = bench.build("--timeout=1", "endless", status=1)
            seen.append(re.findall(r"(?m)^guix build: error: .*", output.err))
        self.assertEqual(*seen)

    def test_plain_user(self) -> None:
        """P17: a user without rights builds, and logs are for everybody to read."""
        bench = Bench(self, GUIXD)
        self.assertEqual(bench.build("user", user=PLAIN_USER).lines, [bench.facts.text("user out")])
        (log,) = bench.build("--log-file", "fine", user=PLAIN_USER).lines
        self.assertEqual(bench.place.run("zcat", log, user=PLAIN_USER).lines, ["being fine"])
