"""Removing trees, and opening what lies below a directory."""

from __future__ import annotations

import os
import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import StoreError
from guixd.store.trees import open_beneath, remove, remove_path, remove_small
from tests.archives import File, Link, read_tree, write_tree
from tests.support import (
    last_descriptor,
    make_deep,
    open_files,
    requires_root,
    temporary_directory,
)

_EXCHANGER = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
one, two = map(os.fsencode, sys.argv[1:])
os.write(1, b"!")
while True:
    libc.renameat2(-100, one, -100, two, 2)
"""
"""Exchanges two names for ever."""


class RemovalTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self, world_readable=True)
        self.fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        self.addCleanup(os.close, self.fd)

    def at(self, name: str) -> str:
        return f"{self.directory}/{name}"


class RemoveTests(RemovalTestCase):
    def test_kinds(self) -> None:
        """Every kind of node goes, links themselves; sizes of files and links are counted."""
        write_tree(os.fsencode(self.at("keep")), {b"f": File(b"x")})
        write_tree(
            os.fsencode(self.at("t")),
            {b"f": File(b"12345"), b"d": {b"e": {}, b"g": File(b"12")}, b"l": Link(b"../keep")},
        )
        os.mkfifo(self.at("t/pipe"))
        self.assertEqual(remove(self.fd, "t"), 5 + 2 + len("../keep"))
        for tree in (File(b"x"), Link(b"keep")):
            write_tree(os.fsencode(self.at("t")), tree)
            remove_path(self.at("t"))
        self.assertEqual(os.listdir(self.fd), ["keep"])
        self.assertEqual(os.listdir(self.at("keep")), ["f"])

    def test_missing(self) -> None:
        """What is not there needs no removal; a missing directory is the caller's error."""
        self.assertEqual(remove(self.fd, "nothing"), 0)
        self.assertEqual(remove_path(self.at("nothing/at/all")), 0)
        write_tree(os.fsencode(self.at("f")), File())
        with self.assertRaises(StoreError) as caught:
            remove_path(self.at("f/below"))
        self.assertIn("f/below", caught.exception.text)

    def test_no_descriptors(self) -> None:
        """Who cannot read a directory, as too much is open, is told which."""
        write_tree(os.fsencode(self.at("t")), {b"f": File()})
        wanted = f"cannot delete '{self.at('t')}': Too many"
        with self.assertRaisesRegex(StoreError, wanted), last_descriptor(free=True):
            remove_path(self.at("t"))

    def test_link_counts(self) -> None:
        """G15: a file counts as freed when it has no more links than was said."""
        write_tree(os.fsencode(self.at("t")), {b"f": File(b"12345")})
        os.link(self.at("t/f"), self.at("other"))
        os.link(self.at("t/f"), self.at("t/again"))
        self.assertEqual(remove(self.fd, "t", max_links=2), 5)
        self.assertEqual(remove(self.fd, "other"), 5)

    def test_deep_and_wide(self) -> None:
        """A tree deeper than any limit on names or descriptors goes completely."""
        before = open_files()

        def add_files(level: int, fd: int) -> None:
            if level % 100 == 0:
                for number in range(20):
                    os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))

        make_deep(self.directory, "d" * 200, 600, add_files)
        remove(self.fd, "d" * 200)
        for number in range(20):
            remove(self.fd, f"f{number}")
        self.assertEqual(os.listdir(self.fd), [])
        self.assertEqual(open_files(), before)

    def test_exchanged_while_removing(self) -> None:
        """CVE-2025-46415: whoever exchanges a directory and a link leads nobody astray."""
        write_tree(os.fsencode(self.at("canary")), {b"d": {b"f": File(b"x")}, b"g": File(b"y")})
        expected = read_tree(os.fsencode(self.at("canary")))
        os.symlink(self.at("canary"), self.at("link"))
        attacker = subprocess.Popen(
            [sys.executable, "-I", "-c", _EXCHANGER, self.at("t/d"), self.at("link")],
            stdout=subprocess.PIPE,
        )
        assert attacker.stdout is not None
        self.assertEqual(attacker.stdout.read(1), b"!")
        try:
            for _ in range(100):
                write_tree(
                    os.fsencode(self.at("new")),
                    {b"d": {b"d": {b"f": File()}, b"f": File(), b"g": File()}, b"z": {}},
                )
                os.rename(self.at("new"), self.at("t"))
                try:
                    remove(self.fd, "t")
                except StoreError:
                    remove(self.fd, "t")
                self.assertEqual(read_tree(os.fsencode(self.at("canary"))), expected)
                self.assertNotIn("t", os.listdir(self.fd))
                # What he took to himself may remain; begin anew with a link.
                remove(self.fd, "link")
                os.symlink(self.at("canary"), self.at("link"))
        finally:
            attacker.kill()
            attacker.wait()
            attacker.stdout.close()

    def test_moved_away_while_removing(self) -> None:
        """CVE-2025-46415: nothing outside goes when an inner directory is moved out of the tree."""
        write_tree(os.fsencode(self.at("out")), {b"f": File(b"x")})
        deep = b"/".join([b"d"] * 60)
        os.makedirs(os.fsencode(self.at("t/")) + deep)
        original = os.rmdir
        inside = "t/" + "/".join(["d"] * 10)

        def rmdir(name: str, *, dir_fd: int | None = None) -> None:
            # The innermost is reached: now move what lies above it to another place.
            if os.path.lexists(self.at(inside)):
                os.rename(self.at(inside), self.at("out/moved"))
            original(name, dir_fd=dir_fd)

        self.patch(os, "rmdir", rmdir)
        with self.assertRaises(StoreError):
            remove(self.fd, "t")
        self.assertEqual(read_tree(os.fsencode(self.at("out/f"))), File(b"x"))


class SmallTests(RemovalTestCase):
    """What is removed at once, and what is left to a thread."""

    def test_small(self) -> None:
        """A small tree goes, links themselves."""
        write_tree(os.fsencode(self.at("keep")), {b"f": File(b"x")})
        tree = {b"f": File(b"1"), b"d": {b"e": {}, b"g": File(b"12")}, b"l": Link(b"../keep")}
        write_tree(os.fsencode(self.at("t")), tree)
        self.assertTrue(remove_small(self.fd, "t"))
        self.assertEqual(os.listdir(self.fd), ["keep"])
        self.assertEqual(os.listdir(self.at("keep")), ["f"])

    def test_large(self) -> None:
        """Many nodes, large files and depth are refused before they cost anything."""
        several = {b"%d" % number: File() for number in range(200)}
        nested: dict[bytes, object] = {}
        for _ in range(200):
            nested = {b"d": nested}
        for tree in several, {b"f": File(bytes(1 << 20))}, nested:
            write_tree(os.fsencode(self.at("t")), tree)
            self.assertFalse(remove_small(self.fd, "t"))
            self.assertEqual(os.listdir(self.fd), ["t"])
            remove(self.fd, "t")
        self.assertEqual(os.listdir(self.fd), [])

    def test_blocks_beyond_the_end(self) -> None:
        """A file may have more blocks than bytes."""
        os.mkdir(self.at("t"))
        os.close(os.open(self.at("t/f"), os.O_CREAT))
        command = ["fallocate", "--keep-size", "--length", "4M", self.at("t/f")]
        subprocess.run(command, check=True)
        self.assertEqual(os.stat(self.at("t/f")).st_size, 0)
        self.assertFalse(remove_small(self.fd, "t"))

    def test_links_and_missing(self) -> None:
        """Only directories are removed so; a link in place of one is not followed."""
        write_tree(os.fsencode(self.at("keep")), {b"f": File(b"x")})
        os.symlink("keep", self.at("l"))
        self.assertFalse(remove_small(self.fd, "l"))
        self.assertFalse(remove_small(self.fd, "missing"))
        self.assertEqual(os.listdir(self.at("keep")), ["f"])


@requires_root
class UnprivilegedTests(RemovalTestCase):
    def test_without_privileges(self) -> None:
        """Directories that their owner may not even list are removed by a plain user."""
        write_tree(
            os.fsencode(self.at("t")),
            {b"a": {b"f": File(b"x")}, b"b": {b"c": {b"f": File()}}, b"d": {}},
        )
        for name, mode in (("t/a", 0o555), ("t/b/c", 0), ("t/b", 0), ("t/d", 0o444), ("t", 0o555)):
            os.chmod(self.at(name), mode)
        subprocess.run(["chown", "-R", "61235:61235", self.directory], check=True)
        script = (
            "import os, sys\n"
            "from guixd.store.trees import canonicalise, remove\n"
            "os.setgroups([]); os.setgid(61235); os.setuid(61235)\n"
            "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
            "canonicalise(fd, 't', 61235, set())\n"
            "os.chmod('t/b', 0, dir_fd=fd)\n"
            "remove(fd, 't')\n"
            "print(os.listdir(fd))\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", script, self.directory],
            check=False,
            capture_output=True,
            text=True,
        )
        self.assertEqual((result.stdout, result.stderr), ("[]\n", ""))


class OpenBeneathTests(RemovalTestCase):
    def test_open(self) -> None:
        """I-PATH: what lies below is opened; links and `..` lead nowhere (X32)."""
        write_tree(
            os.fsencode(self.at("root")),
            {
                b"gnu": {b"store": {b"f": File(b"x")}},
                b"up": Link(b".."),
                b"abs": Link(b"/"),
                b"here": Link(b"gnu"),
                b"f": Link(b"gnu/store/f"),
            },
        )
        root = os.open(self.at("root"), os.O_RDONLY)
        self.addCleanup(os.close, root)
        expected = os.stat(self.at("root/gnu/store")).st_ino
        before = open_files()
        for plain in (False, True):
            for path in ("gnu/store", "/gnu/store", "./gnu//store/"):
                fd = open_beneath(root, path, plain=plain)
                self.assertEqual(os.fstat(fd).st_ino, expected)
                self.assertFalse(os.get_inheritable(fd))
                os.close(fd)
            os.close(open_beneath(root, "gnu/store/f", os.O_RDONLY, plain=plain))
            os.close(open_beneath(root, "", plain=plain))
            for path in (
                "up",
                "abs/etc",
                "here/store",
                "..",
                "gnu/../gnu",
                "gnu/store/f/x",
                "none",
            ):
                self.assertRaises(OSError, open_beneath, root, path, plain=plain)
            self.assertRaises(OSError, open_beneath, root, "f", os.O_RDONLY, plain=plain)
        self.assertEqual(open_files(), before)
