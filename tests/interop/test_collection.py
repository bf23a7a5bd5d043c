"""Collecting with the real `guix gc`, beside the stock daemon (spec: gc)."""

from __future__ import annotations

import re
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, Output, Place


@requires_guest
class Collections(SynchronousTestCase):
    """The same commands on two stores with the same contents."""

    maxDiff = None

    def prepare(self, daemon: str) -> Place:
        """Let a client add things, some with roots."""
        place = Place(self)
        work = place.directory / "work"
        for name in ("kept", "linked", "dead"):
            (work / name).mkdir()
            (work / name / "file").write_text(name * 3000)
            (work / name / "twin").write_text("same" * 3000)
        place.start(daemon)
        for name in ("kept", "linked", "dead"):
            self.items = getattr(self, "items", {})
            added = place.run("guix", "download", str(work / name / "file"))
            self.items[name] = added.lines[0]
        state = place.directory / "state/gcroots"
        (state / "kept").symlink_to(self.items["kept"])
        (work / "result").symlink_to(self.items["linked"])
        place.run(
            "guix", "repl", "--", str(self.script(work, f'(add-indirect-root s "{work}/result")'))
        )
        return place

    @staticmethod
    def script(work: Path, body: str) -> Path:
        script = work / "root.scm"
        script.write_text(f"(use-modules (guix store))\n(with-store s {body})\n")
        return script

    def both(self, *commands: tuple[str, ...]) -> list[tuple[Output, Output]]:
        """Run COMMANDS on both daemons, each on a store of its own."""
        shown: list[list[Output]] = []
        for daemon in STOCK, GUIXD:
            place = self.prepare(daemon)
            shown.append([place.run(*command, status=None) for command in commands])
            place.stop()
        return list(zip(*shown, strict=True))

    def test_lists(self) -> None:
        """G6: live, dead and roots."""
        pairs = self.both(
            ("guix", "gc", "--list-live"), ("guix", "gc", "--list-dead"),
            ("guix", "gc", "--list-roots"), ("guix", "gc", "--list-busy"),
            ("guix", "gc", "--list-failures"),
        )  # fmt: skip
        # What is busy includes what other processes of the machine use, such as other tests.
        own = {place for each in pairs[:2] for output in each for place in places(output)}
        for stock, guixd in pairs[:3]:
            self.assertEqual(places(stock), places(guixd))
        for stock, guixd in pairs:
            self.assertEqual(stock.status, guixd.status)
            self.assertEqual(own.intersection(places(stock)), own.intersection(places(guixd)))
        self.assertIn(self.items["kept"], pairs[0][1].lines)
        self.assertIn(self.items["linked"], pairs[0][1].lines)
        self.assertIn(self.items["dead"], pairs[1][1].lines)

    def test_collect(self) -> None:
        """G4, G13: all, some, and as much as is wanted."""
        pairs = self.both(
            ("guix", "gc", "-D", MISSING), ("guix", "gc", "-C"), ("guix", "gc", "-F", "1M"),
            ("guix", "gc", "--list-dead"), ("guix", "gc", "--verify=contents"),
            ("guix", "gc", "--optimize"), ("guix", "gc", "--vacuum-database"),
            ("guix", "gc", "-d", "1d"),
        )  # fmt: skip
        for stock, guixd in pairs:
            self.assertEqual(stock.status, guixd.status, guixd.err)
            self.assertEqual(numbers(stock), numbers(guixd))
        self.assertIn("/gnu/store", pairs[0][1].out + pairs[0][1].err)

    def test_alive(self) -> None:
        """G2: what is alive cannot be deleted."""
        place = self.prepare(GUIXD)
        refused = place.run("guix", "gc", "-D", self.items["kept"], status=1)
        self.assertIn("still alive", refused.err)
        self.assertTrue(place.outside(self.items["kept"]).exists())


MISSING = "/gnu/store/" + "0" * 32 + "-nothing"


def places(output: Output) -> list[str]:
    """Return the file names that were listed, below whatever directory the test has."""
    return sorted(re.sub(r"^/tmp/[^/]+/", "/", line) for line in output.lines)


def numbers(output: Output) -> list[str]:
    """Return what a user is told, without what depends on the file system."""
    text = output.out + output.err
    lines = [line for line in text.splitlines() if "hard linking saves" not in line]
    return sorted(re.sub(r"\[ *[0-9.]+ +[A-Za-z]+\] ", "", line) for line in lines)
