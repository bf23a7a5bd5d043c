"""`guix gc --verify` and its relatives, with either daemon."""

from __future__ import annotations

import os
import shutil

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, VERIFIED, Place

SCENARIO = """(use-modules (guix store))
(with-store store
  (let* ((one (add-text-to-store store "one" "1"))
         (two (add-text-to-store store "two" one (list one)))
         (alone (add-text-to-store store "alone" "3"))
         (bad (add-text-to-store store "bad" "4")))
    (for-each (lambda (item) (display item) (newline)) (list one two alone bad))))
"""


@requires_guest
class VerifyTests(SynchronousTestCase):
    """S21, P18: what a user reads is the same, and so is what is left in the database."""

    def setUp(self) -> None:
        self.place = Place(self)
        (self.place.directory / "work/items.scm").write_text(SCENARIO)

    def gc(self, *options: str, status: int | None = 0) -> list[str]:
        return self.place.run("guix", "gc", *options, status=status).err.splitlines()

    def damage(self) -> list[str]:
        """Add items and damage them; return their names."""
        script = str(self.place.directory / "work/items.scm")
        items = self.place.run("guix", "repl", "--", script).lines
        one, _, alone, bad = (self.place.outside(item) for item in items)
        one.unlink()
        alone.unlink()
        bad.chmod(0o644)
        bad.write_text("5")
        bad.chmod(0o444)
        return items

    def test_same(self) -> None:
        said: list[list[list[str]]] = []
        for daemon in STOCK, GUIXD:
            self.place.start(daemon)
            found = [self.gc("--verify"), self.gc("--verify=contents")]
            self.assertEqual(found, [VERIFIED[:2], VERIFIED])
            items = self.damage()
            found += [
                self.gc("--verify", status=1),
                self.gc("--verify=contents", status=1),
                self.gc("--verify=contents,repair", status=1),
                self.gc("--verify=repair", status=1),
                self.gc("--list-failures"),
                self.gc("--clear-failures", items[0]),
                self.gc("--vacuum-database"),
            ]
            said.append(found)
            # What was vacuumed is read again, and can be written to.
            scenario = str(self.place.directory / "work/items.scm")
            self.assertEqual(self.place.run("guix", "repl", "--", scenario).lines, items)
            self.place.stop()
            for name in "store", "state/db":
                shutil.rmtree(self.place.directory / name)
                os.mkdir(self.place.directory / name)
        self.assertEqual(said[1], said[0])

    def test_repair(self) -> None:
        """P18, B16: outputs that were modified, a tree and a file, are built again."""
        for daemon in STOCK, GUIXD:
            self.place.start(daemon)
            facts = self.place.scheme("build.scm")
            damaged = [self.place.outside(facts.text(name)) for name in ("greeting", "tree")]
            tree = damaged[1] / "text"
            for file in damaged[0], tree:
                file.chmod(0o644)
                file.write_text("other")
                file.chmod(0o444)
            said = self.gc("--verify=contents", status=1)
            self.assertEqual(len([line for line in said if "was modified" in line]), 2)
            self.gc("--verify=contents,repair", status=None)
            self.assertEqual(damaged[0].read_text(), "hello\n", daemon)
            self.assertEqual(tree.read_text(), "hello\n", daemon)
            self.assertEqual(self.gc("--verify=contents"), VERIFIED, daemon)
            self.place.stop()
            for name in "store", "state/db":
                shutil.rmtree(self.place.directory / name)
                os.mkdir(self.place.directory / name)
