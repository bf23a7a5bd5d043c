"""Equal files shared by guixd and by the stock daemon in one store."""

from __future__ import annotations

import os
from typing import ClassVar

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, VERIFIED, Place

ADD = """(use-modules (guix store))
(with-store store
  (for-each
    (lambda (file)
      (display (add-to-store store (basename file) #t "sha256" file))
      (newline))
    (cdr (command-line))))
"""


@requires_guest
class LinksTests(SynchronousTestCase):
    """S17, S20, O19: one pool for both daemons, in turns."""

    nothing: ClassVar[str] = "   0  bytes freed by hard-linking 0 files\n"

    def setUp(self) -> None:
        self.place = Place(self)
        self.work = self.place.directory / "work"
        (self.work / "add.scm").write_text(ADD)

    def tree(self, name: str) -> str:
        tree = self.work / name
        (tree / "sub").mkdir(parents=True)
        (tree / "sub" / "a").write_bytes(b"a" * 9000)
        (tree / "sub" / "b").write_bytes(b"b" * 8192)
        (tree / "sub" / "b").chmod(0o755)
        (tree / name).write_bytes(b"a" * 9000)
        return str(tree)

    def add(self, *files: str) -> list[str]:
        return self.place.run("guix", "repl", "--", str(self.work / "add.scm"), *files).lines

    def gc(self, *options: str, status: int = 0) -> str:
        return self.place.run("guix", "gc", *options, status=status).err

    def inode(self, item: str, name: str) -> int:
        return os.stat(self.place.outside(item) / name).st_ino

    def test_turns(self) -> None:
        """What one has added, the other shares, and neither finds anything left to do."""
        items = []
        for daemon in STOCK, GUIXD, STOCK, GUIXD:
            self.place.start(daemon)
            items += self.add(self.tree(f"tree{len(items)}"))
            self.assertEqual(self.gc("--optimize"), self.nothing)
            self.place.stop()
        for number, item in enumerate(items):
            self.assertEqual(self.inode(item, "sub/a"), self.inode(items[0], "tree0"))
            self.assertEqual(self.inode(item, "sub/a"), self.inode(item, f"tree{number}"))
            self.assertEqual(self.inode(item, "sub/b"), self.inode(items[0], "sub/b"))
        self.assertEqual(len(os.listdir(self.place.outside("/gnu/store/.links"))), 2)

    def test_optimise(self) -> None:
        """Both say the same of what they save, and leave the same behind."""
        self.place.start(STOCK, "--disable-deduplication")
        first, second = self.add(self.tree("first"), self.tree("second"))
        self.place.stop()
        self.place.start(GUIXD)
        self.assertEqual(self.gc("--optimize"), "  34.37 KiB freed by hard-linking 4 files\n")
        self.place.stop()
        self.place.start(STOCK, "--disable-deduplication")
        self.assertEqual(self.gc("--optimize"), self.nothing)
        self.assertEqual(self.gc("--verify=contents").splitlines(), VERIFIED)
        self.assertEqual(self.inode(first, "first"), self.inode(second, "second"))
