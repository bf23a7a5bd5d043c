"""The same requests of the stock client to the stock daemon and to guixd: same answers."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import PLAIN_USER, requires_guest
from tests.interop.place import GUIXD, STOCK, Facts, Place


@requires_guest
class Scenarios(SynchronousTestCase):
    """Each scenario runs on both daemons; what it shows must be the same, word by word."""

    maxDiff = None

    def compare(
        self, scenario: str, *, but: tuple[str, ...] = (), user: int | None = None
    ) -> Facts:
        """Run SCENARIO on both; return what guixd showed.

        :param but: labels of what may differ.
        """
        shown = []
        for daemon in STOCK, GUIXD:
            place = Place(self)
            tree = place.directory / "work/tree"
            (tree / "empty").mkdir(parents=True)
            (tree / "program").write_text("#!/bin/sh\n")
            (tree / "program").chmod(0o755)
            (tree / "link").symlink_to("nowhere")
            (tree / "file").write_text("text")
            place.start(daemon)
            shown.append(place.scheme(scenario, user=user))
            place.stop()
        stock, guixd = shown
        for label in but:
            stock.pop(label)
            guixd.pop(label)
        self.assertEqual(list(stock), list(guixd))
        for label, value in stock.items():
            self.assertEqual(value, guixd[label], label)
        return guixd

    def test_items(self) -> None:
        """P9, P10, P11: adding and asking."""
        facts = self.compare("items.scm")
        self.assertEqual(facts["valid"], "(#t #t #t #t #f)")
        self.assertEqual(facts["not valid"], "(status 1)")

    def test_build(self) -> None:
        """B1, B21, B24, B27, B29: a graph of three derivations."""
        facts = self.compare("build.scm")
        self.assertEqual(facts["build"], "ok")
        self.assertIn("making a greeting", facts["log"])

    def test_failures(self) -> None:
        """B2, B3, B11, B20, B23, B25, B31, B32, P24, P31: statuses and traces."""
        facts = self.compare(
            "failures.scm",
            but=(
                # There the whole request is given up, here the one derivation fails.
                "special file traces",
                "special file text",
                "special file names the derivation",
                # There a process is started to find out that there is no such builtin.
                "unknown builtin traces",
            ),
        )
        statuses = [facts[label] for label in ("exit 3", "no output", "timeout", "keep going")]
        self.assertEqual(statuses, ["100", "1", "101", "100"])

    def test_environment(self) -> None:
        """B17: what a builder sees."""
        facts = self.compare("environment.scm")
        self.assertIn('"NIX_STORE=/gnu/store"', facts["in * environment"])

    def test_privileges(self) -> None:
        """P17: a user who is not trusted."""
        facts = self.compare("privileges.scm", user=PLAIN_USER)
        self.assertEqual((facts["build"], facts["repair"]), ("ok", "refused"))
