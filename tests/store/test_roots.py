"""Roots of the collector: temporary ones with foreign collectors about, permanent ones."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import Busy, StoreError
from guixd.formats.path import StoreDirectory, StorePath
from guixd.store.roots import (
    TempRoots,
    add_indirect_root,
    canonical,
    find_roots,
)
from tests.store.holder import Holder
from tests.support import make_deep, temporary_directory

STORE = StoreDirectory("/gnu/store")
A, B = STORE.child("0" * 32 + "-a"), STORE.child("1" * 32 + "-b")


class TempRootTests(SynchronousTestCase):
    """What a session protects, and how a collector of another process reads it."""

    def setUp(self) -> None:
        directory = temporary_directory(self)
        self.file = directory + "/12-3"
        self.gc_lock = directory + "/gc.lock"
        self.roots = TempRoots(self.file, self.gc_lock)
        self.addCleanup(self.roots.close)

    def test_contents(self) -> None:
        """G2: names with a NUL each, made when first needed, gone with the session."""
        self.assertFalse(os.path.exists(self.file))
        self.roots.add(A)
        self.roots.add(B)
        self.roots.add(A)
        self.assertEqual(Path(self.file).read_bytes(), f"{A}\0{B}\0".encode())
        self.assertEqual(os.stat(self.file).st_mode, 0o100600)
        self.assertEqual(self.roots.paths, {A, B})
        self.roots.close()
        self.assertFalse(os.path.exists(self.file))
        self.assertRaises(StoreError, self.roots.add, A)

    def test_leftover(self) -> None:
        """G20: what a dead process left under the name does not count."""
        Path(self.file).write_text("junk")
        self.roots.add(A)
        self.assertEqual(Path(self.file).read_bytes(), f"{A}\0".encode())

    def test_full_disk(self) -> None:
        """G21, S11: a name of which only a part fits is not there at all."""
        self.roots.add(A)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(A) + 11, limits[1]))
        try:
            self.assertRaises(StoreError, self.roots.add, B)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertEqual(Path(self.file).read_bytes(), f"{A}\0".encode())
        self.roots.add(B)
        self.assertEqual(Path(self.file).read_bytes(), f"{A}\0{B}\0".encode())

    def test_first_root_during_collection(self) -> None:
        """G19: no file is made while a collector has its lock."""
        holder = Holder(self)
        holder.ask("write", self.gc_lock)
        self.assertRaises(Busy, self.roots.add, A)
        self.assertFalse(os.path.exists(self.file))
        self.assertEqual(self.roots.paths, set())
        holder.ask("drop", self.gc_lock)
        self.roots.add(A)
        self.assertEqual(holder.ask("write", self.gc_lock), "yes")

    def test_collector_reads(self) -> None:
        """G19: while a collector reads nothing is added."""
        holder = Holder(self)
        self.roots.add(A)
        self.assertEqual(holder.ask("write", self.file), "no")
        self.assertEqual(holder.ask("read", self.file), "yes")
        self.assertRaises(Busy, self.roots.add, B)
        self.roots.add(A)
        holder.ask("drop", self.file)
        self.roots.add(B)
        self.assertEqual(Path(self.file).read_bytes(), f"{A}\0{B}\0".encode())
        self.assertEqual(self.roots.paths, {A, B})

    def test_killed_owner(self) -> None:
        """G20: the lock on the file shows that its owner lives."""
        self.roots.add(A)
        holder = Holder(self)
        self.assertEqual(holder.ask("write", self.file), "no")
        self.roots.close()
        self.assertEqual(holder.ask("write", self.file), "yes")


class PermanentRootTests(SynchronousTestCase):
    """Links and files that keep items."""

    def setUp(self) -> None:
        self.home = temporary_directory(self)
        self.state = self.home + "/state"
        os.makedirs(self.state + "/gcroots/auto")
        os.makedirs(self.state + "/profiles")
        self.lines: list[str] = []

    def link(self, name: str, target: str) -> str:
        path = name if name.startswith("/") else f"{self.state}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
        return path

    def find(self) -> dict[str, StorePath]:
        self.lines.clear()
        return find_roots(self.state, STORE, {A, B}.__contains__, self.lines.append)

    def test_kinds(self) -> None:
        """G6: direct links, links below an item, files by name, nested, in profiles."""
        expected = {
            self.link("gcroots/direct", A): A,
            self.link("gcroots/deep/deeper/below", B + "/bin/sh"): B,
            self.link("profiles/per-user/u/profile-1-link", A): A,
            self.link("manifests/m", B): B,
            f"{self.state}/gcroots/{A.base}": A,
        }
        Path(self.state, "gcroots", A.base).touch()
        Path(self.state, "gcroots/other").touch()
        self.link("gcroots/profiles", self.state + "/profiles")
        self.assertEqual(self.find(), expected)
        self.assertEqual(list(self.find()), sorted(expected))

    def test_indirect(self) -> None:
        """G6: the key of an indirect root is the user's link."""
        result = self.link(self.home + "/result", A)
        add_indirect_root(self.state, result)
        add_indirect_root(self.state, result)
        self.assertEqual(len(os.listdir(self.state + "/gcroots/auto")), 1)
        self.assertEqual(self.find(), {result: A})

    def test_name_of_indirect_root(self) -> None:
        """G6: its link is named by a hash of the path; the path need not exist."""
        add_indirect_root(self.state, "/home/u/./x/..//result")
        link = self.state + "/gcroots/auto/jlknlzmcc8vgpkzq233mzp2rfy9pnn48"
        self.assertEqual(os.readlink(link), "/home/u/result")
        os.unlink(link)
        os.symlink("/elsewhere", link)
        add_indirect_root(self.state, "/home/u/result")
        self.assertEqual(os.readlink(link), "/home/u/result")

    def test_canonical(self) -> None:
        """G6: absolute, as text."""
        cases = {"": "/", "a": "/a", "//a//b/": "/a/b", "/a/../..": "/", "./x/.": "/x"}
        self.assertEqual({text: canonical(text) for text in cases}, cases)

    def test_bad_indirect_root(self) -> None:
        """G6: a name that no file can have is an error."""
        self.assertRaises(StoreError, add_indirect_root, self.state, "/a\0b")
        self.assertRaises(StoreError, add_indirect_root, self.state, "/" + "x" * 5000)

    def test_relative_link(self) -> None:
        """G6: an indirect link is relative to its directory."""
        self.link(self.state + "/mine", A)
        self.link("gcroots/sub/r", "../../mine")
        self.assertEqual(self.find(), {self.state + "/mine": A})

    def test_two_hops(self) -> None:
        """G7: one step more is no root."""
        first = self.link(self.home + "/first", A)
        second = self.link(self.home + "/second", first)
        self.link("gcroots/auto/x", second)
        self.assertEqual(self.find(), {})
        self.assertTrue(os.path.lexists(self.state + "/gcroots/auto/x"))

    def test_stale(self) -> None:
        """G8: an automatic link to nothing is removed, another one is kept."""
        gone = self.home + "/gone"
        automatic = self.link("gcroots/auto/x", gone)
        below = self.link("gcroots/auto/y", "/etc/passwd/nothing")
        other = self.link("gcroots/x", gone)
        self.assertEqual(self.find(), {})
        self.assertFalse(os.path.lexists(automatic))
        self.assertFalse(os.path.lexists(below))
        self.assertTrue(os.path.lexists(other))
        self.assertTrue(any("stale" in line for line in self.lines))

    def test_names_of_nothing(self) -> None:
        """G8: names that no file can have, which any user may register, end no collection."""
        self.link("gcroots/auto/circle", self.link(self.home + "/circle", "circle") + "/x")
        add_indirect_root(self.state, "/" + "x" * 300)
        add_indirect_root(self.state, "/home" + "/x" * 2045)
        depth = "profiles/per-user/u"
        os.makedirs(f"{self.state}/{depth}")
        make_deep(f"{self.state}/{depth}", "d" * 250, 20)
        kept = self.link("gcroots/x", A)
        self.assertEqual(self.find(), {kept: A})
        self.assertEqual(os.listdir(self.state + "/gcroots/auto"), [])

    def test_to_directory_or_file(self) -> None:
        """G9: an indirect link to something else than a link is nothing."""
        directory = self.link("gcroots/auto/d", self.home)
        file = self.link("gcroots/auto/f", "/etc/passwd")
        self.assertEqual(self.find(), {})
        self.assertTrue(os.path.lexists(directory) and os.path.lexists(file))

    def test_not_valid(self) -> None:
        """G10: what is not valid is skipped and reported."""
        self.link("gcroots/x", STORE.child("2" * 32 + "-c"))
        self.link("gcroots/store", STORE.path + "/")
        self.link("gcroots/slashes", STORE.path + "//x")
        self.assertEqual(self.find(), {})
        self.assertTrue(any("invalid" in line for line in self.lines))

    def test_nothing(self) -> None:
        """G6: a state directory where there is nothing yet."""
        self.assertEqual(find_roots(self.home, STORE, bool, self.lines.append), {})
        self.assertEqual(self.lines, [])

    def test_links_are_not_entered(self) -> None:
        """G6: neither a link to a directory nor a circle leads anywhere."""
        os.mkdir(self.home + "/elsewhere")
        self.link(self.home + "/elsewhere/r", A)
        self.link("gcroots/x", self.home + "/elsewhere")
        self.link("gcroots/circle", "circle")
        self.assertEqual(self.find(), {})
