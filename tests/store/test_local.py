"""The store of this machine: opening it, adding to it."""

from __future__ import annotations

import hashlib
import os
import pwd
import sqlite3
import stat
import threading
from dataclasses import replace
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import (
    BadDerivation,
    BadHash,
    BadName,
    Busy,
    PathNotValid,
    ReferencesCycle,
    StoreError,
)
from guixd.formats.derivation import Derivation, Output, compute_output_paths, serialise
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from guixd.settings import Directories
from guixd.store import layout
from guixd.store.items import Registration
from guixd.store.local import INLINE_TEXT, LocalStore
from guixd.store.locks import FileLock, PathLocks
from tests.store.holder import Holder
from tests.support import is_root, requires_root, temporary_directory


def directories(base: str) -> Directories:
    return Directories(
        store=base + "/store",
        state=base + "/state",
        log=base + "/log",
        database=base + "/state/db",
        configuration=base + "/etc",
    )


class Case(SynchronousTestCase):
    def setUp(self) -> None:
        self.base = temporary_directory(self)
        self.directories = directories(self.base)
        self.store = self.open()
        self.roots = self.store.temp_roots()

    def open(self, **options: object) -> LocalStore:
        options.setdefault("durable", False)
        store = LocalStore(self.directories, **options)  # type: ignore[arg-type]
        store.open()
        self.addCleanup(self.close, store)
        return store

    def close(self, store: LocalStore) -> None:
        if not store.closed:
            store.close()

    def add(self, name: str, text: bytes = b"text\n", *references: StorePath) -> StorePath:
        return self.store.add_text(name, text, references, self.roots)

    def leftovers(self) -> list[str]:
        """Return what is in the store directory besides valid items."""
        valid = {path.base for path in self.store.database.all_valid_paths()}
        return sorted(set(os.listdir(self.directories.store)) - valid - {".links"})

    def derivation(
        self,
        name: str,
        *inputs: StorePath,
        sources: tuple[StorePath, ...] = (),
        fixed: bool = False,
    ) -> bytes:
        """Return the text of a right derivation."""
        output = Output(StorePath(""), "sha256", "00" * 32) if fixed else Output(StorePath(""))
        drv = Derivation(
            {"out": output}, dict.fromkeys(inputs, ("out",)), sources, "x", "/x", (), {}
        )

        def no_hash(path: StorePath) -> bytes:
            from guixd.formats.derivation import HashCache, parse

            def read(wanted: StorePath) -> Derivation:
                return parse(Path(wanted).read_bytes(), self.store.directory)

            return HashCache(read)(path)

        paths = compute_output_paths(drv, name, self.store.directory, no_hash)
        out = replace(output, path=paths["out"])
        return serialise(replace(drv, outputs={"out": out}, environment={"out": paths["out"]}))

    def assert_item(self, path: StorePath, text: bytes) -> None:
        self.assertEqual(Path(path).read_bytes(), text)
        status = os.lstat(path)
        self.assertEqual(status.st_mode, 0o100444)
        self.assertEqual(status.st_mtime_ns, 1_000_000_000)
        self.assertEqual((status.st_uid, status.st_gid), (os.geteuid(), os.getegid()))
        info = self.store.database.path_info(path)
        nar = nar_of_file(text)
        self.assertEqual((info.nar_hash, info.nar_size), (hashlib.sha256(nar).digest(), len(nar)))


class OpenTests(SynchronousTestCase):
    """S9-S11: what is made and what is refused."""

    def setUp(self) -> None:
        self.base = temporary_directory(self)
        self.directories = directories(self.base)

    def store(self, **options: object) -> LocalStore:
        store = LocalStore(self.directories, **options)  # type: ignore[arg-type]
        self.addCleanup(lambda: None if store.closed else store.close())
        return store

    def mode(self, name: str) -> str:
        return oct(os.lstat(f"{self.base}/{name}").st_mode)

    def test_makes_all(self) -> None:
        """S9: everything missing is made, with modes that do not depend on the umask."""
        old = os.umask(0o077)
        try:
            self.store().open()
        finally:
            os.umask(old)
        directory = oct(stat.S_IFDIR | 0o755)
        for name in (
            "store",
            "store/.links",
            "state",
            "state/db",
            "state/temproots",
            "state/gcroots",
            "state/profiles/per-user",
            "state/userpool",
        ):
            self.assertEqual(self.mode(name), directory, name)
        self.assertEqual(
            os.readlink(self.base + "/state/gcroots/profiles"), self.base + "/state/profiles"
        )
        self.assertEqual(self.mode("state/db/big-lock"), oct(0o100600))
        self.assertEqual(self.mode("state/db/reserved"), oct(0o100600))
        self.assertEqual(os.stat(self.base + "/state/db/reserved").st_size, 8 << 20)

    def test_keeps_what_is_there(self) -> None:
        """S9: directories that exist keep their modes; no link is added later."""
        os.makedirs(self.base + "/state/gcroots")
        os.mkdir(self.base + "/store", 0o700)
        self.store().open()
        self.assertEqual(self.mode("store"), oct(stat.S_IFDIR | 0o700))
        self.assertFalse(os.path.lexists(self.base + "/state/gcroots/profiles"))

    def test_reserve(self) -> None:
        """S11: the flag makes and removes the reserved space."""
        reserved = self.base + "/state/db/reserved"
        store = self.store(reserve=False)
        store.open()
        self.assertFalse(os.path.exists(reserved))
        store.reserve_space(True)
        self.assertEqual(os.stat(reserved).st_size, layout.RESERVED_SIZE)
        os.truncate(reserved, 9 << 20)
        store.reserve_space(True)
        self.assertEqual(os.stat(reserved).st_size, layout.RESERVED_SIZE)
        store.reserve_space(False)
        store.reserve_space(False)
        self.assertFalse(os.path.exists(reserved))

    def test_symlink(self) -> None:
        """S10: neither the store nor a parent may be a link, unless that is asked for."""
        os.makedirs(self.base + "/real/store")
        os.symlink("real", self.base + "/link")
        os.symlink("real/store", self.base + "/store")
        for name in "store", "link/store":
            self.directories = replace(self.directories, store=f"{self.base}/{name}")
            error = self.assertRaises(StoreError, self.store().open)
            self.assertIn("symlink", error.text)
            self.store(ignore_symlinks=True).open()

    def test_schema(self) -> None:
        """S9: a wrong schema is an error each time, and opening works when it is right."""
        self.store().open()
        schema = Path(self.directories.database, "schema")
        schema.write_bytes(b"8")
        store = self.store()
        self.assertRaises(StoreError, store.open)
        self.assertTrue(store.closed)
        schema.write_bytes(b"7")
        store.open()
        self.assertFalse(store.closed)

    def test_big_lock(self) -> None:
        """S9: the big lock is held shared; whoever has it alone keeps us out."""
        store = self.store()
        store.open()
        holder = Holder(self)
        lock = self.directories.database + "/big-lock"
        self.assertEqual(holder.ask("write", lock), "no")
        store.close()
        self.assertEqual(holder.ask("write", lock), "yes")
        self.assertRaises(Busy, store.open)
        holder.ask("drop", lock)
        store.open()
        self.assertEqual(holder.ask("read", lock), "yes")

    def test_close(self) -> None:
        """S16: nothing stays locked or open, no temporary root stays."""
        store = self.store()
        store.open()
        roots = store.temp_roots()
        roots.add(store.directory.child("x"))
        before = os.listdir(self.base + "/state/temproots")
        self.assertEqual(len(before), 1)
        store.close()
        self.assertEqual(os.listdir(self.base + "/state/temproots"), [])
        self.assertEqual(
            sorted(os.listdir(self.directories.database)),
            ["big-lock", "db.sqlite", "flushed", "reserved", "schema"],
        )

    def test_not_a_directory(self) -> None:
        """S9: something else in the place of a directory is an error for the client."""
        Path(self.base, "state").write_text("")
        self.assertRaises(StoreError, self.store().open)


@requires_root
class GroupTests(SynchronousTestCase):
    """S9: the store of a daemon with build users."""

    def test_group(self) -> None:
        """S9: owner, group and mode are set right, also when they were wrong."""
        base = temporary_directory(self)
        for _ in range(2):
            store = LocalStore(directories(base), build_gid=61234)
            store.open()
            store.close()
            status = os.stat(base + "/store")
            self.assertEqual((status.st_uid, status.st_gid), (0, 61234))
            self.assertEqual(stat.S_IMODE(status.st_mode), 0o1775)
            os.chown(base + "/store", 5, 5)
            os.chmod(base + "/store", 0o777)


class TextTests(Case):
    """Op 8."""

    def test_add(self) -> None:
        """S4: a new item with its metadata, registered; no lock file is left."""
        path = self.add("hello.txt", b"Hello, store!\n")
        self.assertEqual(
            path,
            self.store.directory.text_path(
                "hello.txt", hashlib.sha256(b"Hello, store!\n").digest(), ()
            ),
        )
        self.assert_item(path, b"Hello, store!\n")
        other = self.add("ref", path.encode(), path)
        self.assertEqual(self.store.database.path_info(other).references, (path,))
        self.assertEqual(self.leftovers(), [])
        self.assertEqual(self.roots.paths, {path, other})
        self.assertEqual(self.store.closure([other]), {path, other})

    def test_umask(self) -> None:
        """S4: the mode does not depend on the umask."""
        old = os.umask(0o777)
        try:
            path = self.add("x", b"")
        finally:
            os.umask(old)
        self.assert_item(path, b"")

    def test_again(self) -> None:
        """S14: a valid item is left as it is, but protected."""
        path = self.add("x", b"1")
        before = os.stat(path)
        roots = self.store.temp_roots()
        self.assertEqual(self.store.add_text("x", b"1", (), roots), path)
        self.assertEqual(os.stat(path), before)
        self.assertEqual(roots.paths, {path})
        self.assertEqual(self.store.protected(but=self.roots), {path})

    def test_missing_reference(self) -> None:
        """S5: an invalid reference is an error, and nothing is there afterwards."""
        missing = self.store.directory.child("0" * 32 + "-missing")
        error = self.assertRaises(PathNotValid, self.add, "x", b"1", missing)
        self.assertIn("not valid", error.text)
        self.assertEqual(self.leftovers(), [])
        self.assertTrue(self.store.is_valid(self.add("x", b"1")))

    def test_names(self) -> None:
        """S3: bad names, the empty name, and the longest."""
        for name in "a/b", "a b", "é", ".x", "a\0":
            self.assertRaises(BadName, self.add, name, b"")
        self.assertTrue(self.add("", b"").endswith("-"))
        self.assert_item(self.add("x" * 217, b""), b"")
        self.assertRaises(StoreError, self.add, "x" * 218, b"")
        self.assertRaises(StoreError, self.add, "x" * 300, b"")
        self.assertEqual(self.leftovers(), [])

    def test_longest_name_with_lock(self) -> None:
        """S3: with a foreign session about, the lock file's name counts too."""
        holder = Holder(self)
        holder.ask("read", self.directories.database + "/big-lock")
        self.assert_item(self.add("x" * 217, b""), b"")
        self.assertRaises(StoreError, self.add, "x" * 218, b"")
        self.assertEqual(self.leftovers(), [])

    def test_leftovers_are_replaced(self) -> None:
        """S5: what lies at the place, of whatever kind, gives way."""
        texts = [b"1", b"2", b"3"]
        digests = [hashlib.sha256(text).digest() for text in texts]
        paths = [self.store.directory.text_path("x", digest, ()) for digest in digests]
        Path(paths[0]).write_text("junk")
        os.makedirs(paths[1] + "/sub")
        os.symlink("/etc/passwd", paths[2])
        for text, path in zip(texts, paths, strict=True):
            self.assertEqual(self.add("x", text), path)
            self.assert_item(path, text)
        self.assertEqual(len(self.leftovers()), 1)

    def test_collector_in_the_way(self) -> None:
        """G19: no item appears before it is protected."""
        holder = Holder(self)
        holder.ask("write", self.store.gc_lock_file)
        self.assertRaises(Busy, self.add, "x", b"1")
        self.assertEqual(self.store.database.all_valid_paths(), [])
        holder.ask("drop", self.store.gc_lock_file)
        self.add("x", b"1")

    def test_foreign_session(self) -> None:
        """S14: with a foreign session about the item's lock file is used, then deleted."""
        path = self.store.directory.text_path("x", hashlib.sha256(b"1").digest(), ())
        holder = Holder(self)
        holder.ask("read", self.directories.database + "/big-lock")
        holder.ask("write", path + ".lock")
        self.assertRaises(Busy, self.add, "x", b"1")
        self.assertFalse(os.path.lexists(path))
        holder.ask("drop", path + ".lock")
        self.assertEqual(self.add("x", b"1"), path)
        self.assert_item(path, b"1")
        self.assertEqual(self.leftovers(), [])

    def test_no_foreign_session(self) -> None:
        """S14: without one no lock file is needed, and one that lies there is no obstacle."""
        path = self.store.directory.text_path("x", hashlib.sha256(b"1").digest(), ())
        Path(path + ".lock").write_text("")
        self.add("x", b"1")
        self.assertEqual(self.leftovers(), [path.base + ".lock"])

    def test_own_build(self) -> None:
        """S14: what this process has locked for a build is not touched."""
        path = self.store.directory.text_path("x", hashlib.sha256(b"1").digest(), ())
        locks = PathLocks.acquire([path])
        assert locks is not None
        self.assertRaises(Busy, self.add, "x", b"1")
        locks.release(delete=True)
        self.add("x", b"1")

    def test_database_in_use(self) -> None:
        """S14: a writer elsewhere is no reason to leave a file or to fail for good."""
        other = sqlite3.connect(self.directories.database + "/db.sqlite", isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN IMMEDIATE")
        self.assertRaises(Busy, self.add, "x", b"1")
        self.assertEqual(self.leftovers(), [])
        other.execute("ROLLBACK")
        self.assert_item(self.add("x", b"1"), b"1")

    def test_two_stores(self) -> None:
        """S14: two daemons add the same; both succeed and it is written once."""
        path = self.add("x", b"1")
        before = os.stat(path).st_ino
        other = self.open()
        roots = other.temp_roots()
        self.assertEqual(other.add_text("x", b"1", (), roots), path)
        self.assertEqual(other.add_text("y", b"2", (path,), roots), self.add("y", b"2", path))
        self.assertEqual(os.stat(path).st_ino, before)
        self.assertEqual(self.leftovers(), [])

    def test_large(self) -> None:
        """S4: a large text is prepared in a thread."""
        text = b"x" * (INLINE_TEXT + 1)
        self.assertIsNone(self.store.try_add_text("x", text, (), self.roots))
        prepared = []
        thread = threading.Thread(
            target=lambda: prepared.append(self.store.prepare_text("x", text, ()))
        )
        thread.start()
        thread.join()
        path = self.store.commit_text(prepared[0], self.roots)
        self.assert_item(path, text)
        self.assertEqual(self.store.commit_text(prepared[0], self.roots), path)
        self.assertEqual(self.store.try_add_text("y", b"", (), self.roots), self.add("y", b""))


class DerivationTests(Case):
    """Texts that must be derivations."""

    def test_add(self) -> None:
        """D1: outputs are known afterwards, and it can be read back."""
        source = self.add("source")
        first = self.add("a.drv", self.derivation("a", sources=(source,)), source)
        second = self.add("b.drv", self.derivation("b", first), first)
        drv = self.store.read_derivation(second)
        self.assertEqual(drv.inputs, {first: ("out",)})
        (out,) = drv.output_paths
        self.assertEqual(self.store.database.valid_derivers(out), [second])
        self.assertEqual(self.store.database.derivation_outputs(second), {"out": out})
        reopened = self.open()
        self.assertEqual(reopened.read_derivation(second), drv)
        self.assertRaises(PathNotValid, reopened.read_derivation, out)

    def test_refused(self) -> None:
        """D2, D3, D5, S34: what is no right derivation leaves nothing behind."""
        right = self.derivation("a")
        fixed = self.derivation("a", fixed=True)
        cases = [
            ("a.drv", right[:-1], BadDerivation, "error parsing derivation"),
            ("a.drv", right + b"\n", BadDerivation, "error parsing derivation"),
            ("a.drv", b"", BadDerivation, "error parsing derivation"),
            ("b.drv", right, BadDerivation, "should be"),
            ("a.drv", right.replace(b'[("out"', b'[("other"'), BadDerivation, "incorrect output"),
            ("a.drv", fixed.replace(b"0" * 64, b"0" * 62), BadHash, "invalid SHA256 hash"),
            ("a.drv", fixed.replace(b"sha256", b"sha257"), BadHash, "unknown hash algorithm"),
        ]
        for name, text, kind, words in cases:
            error = self.assertRaises(kind, self.add, name, text)
            self.assertIn(words, error.text)
        self.assertEqual(self.leftovers(), [])
        self.assertEqual(self.store.database.all_valid_paths(), [])
        self.store.read_derivation(self.add("a.drv", right))

    def test_writer_is_free_meanwhile(self) -> None:
        """S34: reading and checking a derivation happens outside of any transaction."""
        other = sqlite3.connect(self.directories.database + "/db.sqlite", isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN IMMEDIATE")
        text = self.derivation("a")
        prepared = self.store.prepare_text("a.drv", text, ())
        self.assertRaises(BadDerivation, self.store.prepare_text, "a.drv", text[:-1], ())
        other.execute("ROLLBACK")
        self.assertTrue(self.store.is_valid(self.store.commit_text(prepared, self.roots)))

    def test_missing_input(self) -> None:
        """D7: an input that is not valid, though a file of its name is there."""
        first = self.add("a.drv", self.derivation("a"))
        text = self.derivation("b", first)
        self.store.invalidate(first)
        self.assertTrue(os.path.exists(first))
        error = self.assertRaises(PathNotValid, self.add, "b.drv", text, first)
        self.assertIn(first, error.text)
        self.add("a.drv", self.derivation("a"))
        self.add("b.drv", text, first)

    def test_reference_needed(self) -> None:
        """D2: inputs and sources must be referred to."""
        source = self.add("source")
        text = self.derivation("a", sources=(source,))
        self.assertRaises(BadDerivation, self.add, "a.drv", text)
        self.add("a.drv", text, source)

    def test_no_outputs(self) -> None:
        """D8: a derivation without outputs."""
        path = self.add("none.drv", b'Derive([],[],[],"x","/x",[],[])')
        self.assertEqual(self.store.database.derivation_outputs(path), {})

    def test_many_inputs(self) -> None:
        """D7: the reactor does not read many derivations; a thread does."""
        inputs = [self.add(f"{n}.drv", self.derivation(str(n))) for n in range(40)]
        text = self.derivation("top", *inputs)
        other = self.open()
        roots = other.temp_roots()
        self.assertIsNone(other.try_add_text("top.drv", text, inputs, roots))
        prepared = []
        thread = threading.Thread(
            target=lambda: prepared.append(other.prepare_text("top.drv", text, inputs))
        )
        thread.start()
        thread.join()
        path = other.commit_text(prepared[0], roots)
        # Here everything is known already.
        self.assertEqual(self.store.try_add_text("top.drv", text, inputs, self.roots), path)
        bottom = self.derivation("bottom", *inputs)
        self.assertIsNotNone(self.store.try_add_text("bottom.drv", bottom, inputs, self.roots))


class RegisterTests(Case):
    """Items whose files others put in place."""

    def place(self, name: str, text: bytes = b"x") -> StorePath:
        path = self.store.directory.child(name.rjust(32, "0") + "-" + name)
        Path(path).write_bytes(text)
        return path

    def test_register(self) -> None:
        """S13: derivations are read and checked; others are taken as they are."""
        plain = self.place("plain")
        text = self.derivation("a", sources=(plain,))
        drv = self.place("a.drv", text)
        second = self.place("b.drv", self.derivation("b", drv))
        self.store.register(
            [
                Registration(second, b"h" * 32, 1, frozenset({drv})),
                Registration(drv, b"h" * 32, 1, frozenset({plain})),
                Registration(plain, b"h" * 32, 1),
            ]
        )
        self.assertEqual(list(self.store.database.derivation_outputs(drv)), ["out"])
        self.assertEqual(self.store.closure([second]), {plain, drv, second})

    def test_refused(self) -> None:
        """D2, S13: a wrong derivation, a missing file, a circle."""
        bad = self.place("c.drv", self.derivation("a"))
        error = self.assertRaises(
            BadDerivation, self.store.register, [Registration(bad, b"h" * 32, 1)]
        )
        self.assertIn("incorrect output", error.text)
        os.unlink(bad)
        for make in (lambda: None, lambda: os.mkdir(bad), lambda: os.symlink("x", bad)):
            make()
            self.assertRaises(StoreError, self.store.register, [Registration(bad, b"h" * 32, 1)])
            if os.path.isdir(bad):
                os.rmdir(bad)
        a, b = self.place("a"), self.place("b")
        self.assertRaises(
            ReferencesCycle,
            self.store.register,
            [
                Registration(a, b"h" * 32, 1, frozenset({b})),
                Registration(b, b"h" * 32, 1, frozenset({a})),
            ],
        )
        self.assertEqual(self.store.database.all_valid_paths(), [])


class OtherTests(Case):
    """Roots, users, logs."""

    def test_roots(self) -> None:
        """G6: permanent roots are found through the store; sessions' roots are counted."""
        path = self.add("x")
        link = self.base + "/result"
        os.symlink(path, link)
        self.store.add_indirect_root(link)
        self.assertEqual(self.store.find_roots(), ((link, path),))
        self.roots.close()
        self.assertEqual(self.store.protected(), set())

    def test_session_files(self) -> None:
        """G2: two sessions have files of their own."""
        names = {self.store.temp_roots()._file for _ in range(3)}
        self.assertEqual(len(names), 3)
        for name in names:
            self.assertTrue(os.path.basename(name).startswith(f"{os.getpid()}-"))

    def test_user_directory(self) -> None:
        """S32: made for who is known; what exists is left alone."""
        user = pwd.getpwuid(os.geteuid())
        directory = f"{self.directories.state}/profiles/per-user/{user.pw_name}"
        self.assertIsNone(self.store.ensure_user_directory(user.pw_uid))
        status = os.stat(directory)
        self.assertEqual((status.st_uid, stat.S_IMODE(status.st_mode)), (user.pw_uid, 0o755))
        os.chmod(directory, 0o700)
        self.assertIsNone(self.store.ensure_user_directory(user.pw_name))
        self.assertEqual(stat.S_IMODE(os.stat(directory).st_mode), 0o700)
        self.assertIsNotNone(self.store.ensure_user_directory(4_000_000_000))
        self.assertIsNotNone(self.store.ensure_user_directory("nobody-of-that-name"))
        self.assertIsNotNone(layout.make_user_directory(self.directories.state, "../x", 0))
        if is_root():
            self.assertIsNone(layout.make_user_directory(self.directories.state, "u", 61234))
            path = self.directories.state + "/profiles/per-user/u"
            self.assertEqual(os.stat(path).st_uid, 61234)
            os.chown(path, 5, -1)
            self.assertIsNone(layout.make_user_directory(self.directories.state, "u", 61234))
            self.assertEqual(os.stat(path).st_uid, 5)

    def test_other_locks(self) -> None:
        """S16: two stores of one process do not lose each other's big lock."""
        other = self.open()
        other.close()
        lock = FileLock(self.directories.database + "/big-lock")
        self.addCleanup(lock.close)
        self.assertFalse(lock.acquire(exclusive=True))
