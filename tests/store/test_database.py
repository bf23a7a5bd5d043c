"""The database: what it has, what it answers, what it refuses."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadHash, Busy, PathNotValid, ReferencesCycle, StoreError
from guixd.formats.derivation import Derivation, Output
from guixd.formats.path import StoreDirectory, StorePath
from guixd.store import changes
from guixd.store import database as database_module
from guixd.store.database import Database
from guixd.store.items import PathInfo, Registration
from tests.support import temporary_directory

STORE = StoreDirectory("/gnu/store")
HASH = bytes(range(32))
NOW = 1_234_567


def item(name: str) -> StorePath:
    return STORE.child(name.rjust(32, "0") + "-" + name)


def registration(name: str, *references: str) -> Registration:
    return Registration(item(name), HASH, 120, frozenset(map(item, references)))


class Case(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.database = self.open()

    def open(self) -> Database:
        database = Database(self.directory, STORE, clock=lambda: NOW)
        self.addCleanup(database.close)
        return database

    def add(self, name: str, *references: str) -> StorePath:
        self.database.register([registration(name, *references)])
        return item(name)

    def foreign(self, *statements: str) -> None:
        """Have another process execute STATEMENTS."""
        script = (
            "import sqlite3, sys\n"
            "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "c.execute('PRAGMA foreign_keys = ON')\n"
            "for s in sys.argv[2:]: c.execute(s)\n"
        )
        file = self.directory + "/db.sqlite"
        subprocess.run([sys.executable, "-I", "-c", script, file, *statements], check=True)


class SchemaTests(Case):
    """The files and tables that all daemons share."""

    def test_version(self) -> None:
        """S9: the version is exactly one byte; other contents are refused."""
        schema = Path(self.directory, "schema")
        self.assertEqual(schema.read_bytes(), b"7")
        for text in b"8", b"6", b"7\n", b" 7", b"", b"seven", b"7.0":
            schema.write_bytes(text)
            error = self.assertRaises(StoreError, Database, self.directory, STORE)
            self.assertIn("corrupt" if text not in (b"8", b"6") else "schema", error.text)
        schema.write_bytes(b"7")
        self.open()

    def test_begun_creation(self) -> None:
        """S9: version 0, or none, means that a database is to be made."""
        self.add("a")
        Path(self.directory, "schema").write_bytes(b"0")
        self.assertTrue(self.open().is_valid(item("a")))
        self.assertEqual(Path(self.directory, "schema").read_bytes(), b"7")

    def test_missing_file(self) -> None:
        """S9: a version without a database is an error."""
        directory = temporary_directory(self)
        Path(directory, "schema").write_bytes(b"7")
        self.assertRaises(StoreError, Database, directory, STORE)
        self.assertFalse(Path(directory, "db.sqlite").exists())

    def test_modes(self) -> None:
        """S9: others may read, whatever the umask."""
        directory = temporary_directory(self)
        old = os.umask(0o077)
        try:
            database = Database(directory, STORE)
        finally:
            os.umask(old)
        database.close()
        modes = {name: os.stat(f"{directory}/{name}").st_mode for name in ("schema", "db.sqlite")}
        self.assertEqual(modes, {"schema": 0o100644, "db.sqlite": 0o100644})

    def test_closed(self) -> None:
        """S9: nothing but database and version is left after closing."""
        directory = temporary_directory(self)
        database = Database(directory, STORE)
        database.close()
        self.assertEqual(sorted(os.listdir(directory)), ["db.sqlite", "schema"])
        self.assertRaises(sqlite3.ProgrammingError, database.is_valid, item("a"))

    def test_tables(self) -> None:
        """S12: names and columns are those that other programs use."""
        connection = sqlite3.connect(self.directory + "/db.sqlite")
        self.addCleanup(connection.close)
        columns = {
            table: [
                (name, kind, bool(needed), bool(key))
                for _, name, kind, needed, _, key in connection.execute(
                    f"PRAGMA table_info({table})"
                )
            ]
            for table in ("ValidPaths", "Refs", "DerivationOutputs", "FailedPaths")
        }
        self.assertEqual(
            columns,
            {
                "ValidPaths": [
                    ("id", "INTEGER", True, True),
                    ("path", "TEXT", True, False),
                    ("hash", "TEXT", True, False),
                    ("registrationTime", "INTEGER", True, False),
                    ("deriver", "TEXT", False, False),
                    ("narSize", "INTEGER", False, False),
                ],
                "Refs": [
                    ("referrer", "INTEGER", True, True),
                    ("reference", "INTEGER", True, True),
                ],
                "DerivationOutputs": [
                    ("drv", "INTEGER", True, True),
                    ("id", "TEXT", True, True),
                    ("path", "TEXT", True, False),
                ],
                "FailedPaths": [
                    ("path", "TEXT", True, True),
                    ("time", "INTEGER", True, False),
                ],
            },
        )
        names = {
            name
            for (name,) in connection.execute(
                "SELECT name FROM sqlite_master WHERE sql IS NOT NULL AND type <> 'table'"
            )
        }
        self.assertEqual(
            names,
            {"IndexReferrer", "IndexReference", "IndexDerivationOutputs", "DeleteSelfRefs"},
        )
        self.assertEqual(connection.execute("PRAGMA journal_mode").fetchone(), ("wal",))


class RegistrationTests(Case):
    """What becomes valid."""

    def test_info(self) -> None:
        """S4: all that is known comes back, also from the file itself."""
        self.add("a")
        self.database.register(
            [Registration(item("b"), HASH, 7, frozenset({item("b"), item("a")}), item("x.drv"))]
        )
        expected = PathInfo(item("b"), HASH, 7, (item("a"), item("b")), NOW, item("x.drv"))
        reader = self.database.read_only_copy()
        self.addCleanup(reader.close)
        for queries in self.database, self.open(), reader:
            self.assertEqual(queries.path_info(item("b")), expected)
            self.assertTrue(queries.is_valid(item("b")))
            self.assertFalse(queries.is_valid(item("c")))
            self.assertIsNone(queries.find_path_info(item("c")))
            self.assertRaises(PathNotValid, queries.path_info, item("c"))
        rows = sqlite3.connect(self.directory + "/db.sqlite")
        self.addCleanup(rows.close)
        self.assertEqual(
            rows.execute("SELECT * FROM ValidPaths WHERE path LIKE '%b'").fetchall(),
            [(2, item("b"), "sha256:" + HASH.hex(), NOW, item("x.drv"), 7)],
        )

    def test_unknown_size(self) -> None:
        """S4: a size of 0 is stored as unknown."""
        self.database.register([Registration(item("a"), HASH, 0)])
        self.assertEqual(self.open().path_info(item("a")).nar_size, 0)
        rows = sqlite3.connect(self.directory + "/db.sqlite")
        self.addCleanup(rows.close)
        self.assertEqual(rows.execute("SELECT narSize FROM ValidPaths").fetchall(), [(None,)])

    def test_batch_of_any_order(self) -> None:
        """S13: items of one batch may refer to each other, whichever comes first."""
        self.database.register([registration("b", "a", "b"), registration("a")])
        self.assertEqual(self.database.path_info(item("b")).references, (item("a"), item("b")))

    def test_missing_reference(self) -> None:
        """S5: all or nothing; it can be tried again with what was missing."""
        batch = [registration("a"), registration("b", "a", "c")]
        error = self.assertRaises(PathNotValid, self.database.register, batch)
        self.assertIn("is not valid", error.text)
        self.assertIn(item("c"), error.text)
        self.assertFalse(self.database.is_valid(item("a")))
        self.assertEqual(self.open().all_valid_paths(), [])
        self.add("c")
        self.database.register(batch)
        self.assertTrue(self.database.is_valid(item("b")))

    def test_circle(self) -> None:
        """S13: two new items that refer to each other."""
        batch = [registration("a", "b"), registration("b", "a"), registration("c")]
        error = self.assertRaises(ReferencesCycle, self.database.register, batch)
        self.assertIn("cycle detected in the references of", error.text)
        self.assertEqual(self.open().all_valid_paths(), [])

    def test_circle_with_recorded_references(self) -> None:
        """S13: references that are there already count, too."""
        self.add("a")
        self.add("b", "a")
        batch = [registration("a", "b"), registration("b")]
        self.assertRaises(ReferencesCycle, self.database.register, batch)
        self.assertEqual(self.database.path_info(item("a")).references, ())

    def test_again(self) -> None:
        """S5: registering once more replaces hash and size and adds references."""
        self.add("a")
        self.add("b")
        self.database.register([Registration(item("c"), HASH, 1, frozenset({item("a")}))])
        again = Registration(item("c"), b"x" * 32, 2, frozenset({item("b")}), item("y.drv"))
        self.database.register([again])
        expected = PathInfo(item("c"), b"x" * 32, 2, (item("a"), item("b")), NOW, None)
        self.assertEqual(self.database.path_info(item("c")), expected)
        self.assertEqual(self.open().path_info(item("c")), expected)

    def test_hash(self) -> None:
        """S21: hash and size can be corrected."""
        self.add("a")
        self.database.set_hash(item("a"), b"y" * 32, 9)
        info = self.database.path_info(item("a"))
        self.assertEqual((info.nar_hash, info.nar_size), (b"y" * 32, 9))
        self.assertRaises(PathNotValid, self.database.set_hash, item("b"), HASH, 1)

    def test_derivation_must_be_known(self) -> None:
        """S34: the writer never reads a derivation itself."""
        self.assertRaises(StoreError, self.database.register, [registration("a.drv")])

    def test_invalidate(self) -> None:
        """S12: what is referred to stays; a reference to itself does not count."""
        self.add("a", "a")
        self.add("b", "a")
        error = self.assertRaises(StoreError, self.database.invalidate, item("a"))
        self.assertIn("in use by", error.text)
        self.assertTrue(self.database.is_valid(item("a")))
        self.database.invalidate(item("b"))
        self.database.invalidate(item("a"))
        self.database.invalidate(item("a"))
        self.assertFalse(self.database.is_valid(item("a")))
        self.assertIsNone(self.database.find_path_info(item("b")))
        self.assertEqual(self.open().all_valid_paths(), [])

    def test_foreign_keys(self) -> None:
        """S12: even a statement of our own cannot delete what is referred to."""
        self.add("a", "a")
        self.add("b", "a")
        execute = self.database._connection.execute
        statement = "DELETE FROM ValidPaths WHERE path = ?"
        self.assertRaises(sqlite3.IntegrityError, execute, statement, (str(item("a")),))
        execute(statement, (str(item("b")),))
        execute(statement, (str(item("a")),))
        self.assertEqual(execute("SELECT count(*) FROM Refs").fetchone(), (0,))


class QueryTests(Case):
    """Questions."""

    def derivation(self, name: str, **outputs: str) -> StorePath:
        drv = Derivation(
            {key: Output(item(value)) for key, value in outputs.items()}, {}, (), "", "", (), {}
        )
        self.database.register([registration(name)], {item(name): drv})
        return item(name)

    def test_referrers(self) -> None:
        """P9: sorted, itself among them; none for what is not valid."""
        self.add("a", "a")
        self.add("c", "a")
        self.add("b", "a")
        self.assertEqual(self.database.referrers(item("a")), [item("a"), item("b"), item("c")])
        self.assertEqual(self.database.referrers(item("z")), [])

    def test_derivations(self) -> None:
        """P9: outputs by name, and the derivations that have an output."""
        first = self.derivation("x.drv", out="o", lib="l")
        second = self.derivation("w.drv", out="o")
        self.assertEqual(
            list(self.database.derivation_outputs(first).items()),
            [("lib", item("l")), ("out", item("o"))],
        )
        self.assertEqual(self.database.valid_derivers(item("o")), [second, first])
        self.assertEqual(self.database.valid_derivers(item("l")), [first])
        self.assertEqual(self.database.valid_derivers(first), [])
        self.add("a")
        self.assertEqual(self.database.derivation_outputs(item("a")), {})
        self.assertRaises(PathNotValid, self.database.derivation_outputs, item("l"))
        self.database.invalidate(first)
        self.assertEqual(self.database.valid_derivers(item("l")), [])

    def test_hash_part(self) -> None:
        """P10: the first path with that hash part, or none; the length must be right."""
        self.add("b")
        self.add("a")
        find = self.database.path_from_hash_part
        self.assertEqual(find(item("a").hash_part), item("a"))
        self.assertIsNone(find("1" * 32))
        self.assertIsNone(find("z" * 32))
        self.assertIsNone(find("\udcff" * 32))
        self.assertRaises(BadHash, find, "1" * 31)

    def test_all(self) -> None:
        """P11: all valid paths, sorted by bytes."""
        for name in "b", "a", "B", "é":
            self.add(name)
        paths = self.database.all_valid_paths()
        self.assertEqual(set(paths), {item(n) for n in ("a", "b", "B", "é")})
        self.assertEqual(paths, sorted(paths, key=os.fsencode))

    def test_foreign_bytes(self) -> None:
        """S14: a name that is no UTF-8, which others have put there, does not hide the rest."""
        self.add("a")
        self.foreign(
            "INSERT INTO ValidPaths (path, hash, registrationTime)"
            f" VALUES (CAST(x'{item('b').encode().hex()}ff' AS TEXT), '', 1)"
        )
        reader = self.database.read_only_copy()
        self.addCleanup(reader.close)
        for queries in self.database, reader:
            self.assertEqual(queries.all_valid_paths(), [item("a"), item("b") + "\udcff"])
            self.assertEqual(queries.path_info(item("a")).path, item("a"))

    def test_subset(self) -> None:
        """P11: those that are valid, remembered or not; any bytes may be asked for."""
        names = [str(n) for n in range(600)]
        self.database.register([registration(name) for name in names])
        wanted = [item(str(n)) for n in range(500, 700)] + [STORE.child("\udcff"), item("🐃")]
        expected = {item(str(n)) for n in range(500, 600)}
        reader = self.database.read_only_copy()
        self.addCleanup(reader.close)
        other = self.open()
        for queries in self.database, self.database, reader, other, other:
            self.assertEqual(queries.valid_paths(wanted), expected)
        self.assertEqual(other.valid_paths([]), set())
        self.assertFalse(other.is_valid(STORE.child("\udcff")))
        self.assertIsNone(other.find_path_info(STORE.child("\udcff")))
        self.assertEqual(other.referrers(STORE.child("\udcff")), [])

    def test_closure(self) -> None:
        """S12: all that is referred to, however far; the start must be valid."""
        self.add("a", "a")
        self.add("b", "a")
        self.add("c", "b", "c")
        self.add("d", "a")
        self.assertEqual(self.database.closure([item("c")]), set(map(item, "abc")))
        self.assertEqual(self.database.closure([item("d"), item("b")]), set(map(item, "abd")))
        self.assertEqual(self.database.closure([]), set())
        self.assertRaises(PathNotValid, self.database.closure, [item("a"), item("x")])

    def test_closure_again(self) -> None:
        """Closures are right after each change: by us, by others, of what is valid."""
        database = self.database
        for name, *references in ("a",), ("b", "a"), ("c",):
            self.add(name, *references)
        for _ in range(2):
            self.assertEqual(database.closure([item("b")]), {item("a"), item("b")})
        self.add("d", "b")
        self.assertEqual(database.closure([item("d")]), set(map(item, "abd")))
        self.add("b", "c")
        self.assertEqual(database.closure([item("b")]), set(map(item, "abc")))
        self.assertEqual(database.closure([item("d")]), set(map(item, "abcd")))
        database.invalidate(item("d"))
        self.assertRaises(PathNotValid, database.closure, [item("d")])
        self.foreign("DELETE FROM Refs")
        self.assertEqual(database.closure([item("b")]), {item("b")})

    def test_large_closures(self) -> None:
        """What is remembered of closures has a bound."""
        self.patch(database_module, "_MAXIMUM_IN_CLOSURES", 3)
        database = self.open()
        for name, *references in ("a",), ("b", "a"), ("c", "b"), ("d", "c"):
            database.register([registration(name, *references)])
        for name in "abcdabcd":
            self.assertEqual(len(database.closure([item(name)])), "abcd".index(name) + 1)
            kept = sum(map(len, database._closures.values()))
            self.assertLessEqual(kept, 3)
        self.assertIn(frozenset([item("c")]), database._closures)

    def test_deep_closure(self) -> None:
        """S12: a chain of thousands."""
        batch = [registration("0")] + [registration(str(n), str(n - 1)) for n in range(1, 3000)]
        random.Random(7).shuffle(batch)
        self.database.register(batch)
        self.assertEqual(len(self.database.closure([item("2999")])), 3000)

    def test_failures(self) -> None:
        """S33: cleared by path, by derivation and all at once."""
        drv = self.derivation("x.drv", out="o", lib="l")
        failed = [item(name) for name in "lopq"]
        self.database.add_failed(failed)
        self.database.add_failed(failed[:1])
        self.assertEqual(self.database.failed_paths(), sorted(failed))
        self.assertTrue(self.database.has_failed(item("o")))
        self.assertFalse(self.database.has_failed(item("z")))
        self.database.clear_failed([item("p"), "\udcff"])
        self.assertEqual(self.database.failed_paths(), [item(name) for name in "loq"])
        self.database.clear_failed([drv])
        self.assertEqual(self.database.failed_paths(), [item("q")])
        self.database.clear_failed(["*"])
        self.assertEqual(self.database.failed_paths(), [])

    def test_malformed_hash(self) -> None:
        """S21: a damaged row is an error, no crash."""
        self.add("a")
        self.foreign("UPDATE ValidPaths SET hash = 'sha256:12'")
        self.assertRaises(StoreError, self.database.path_info, item("a"))


class ForeignTests(Case):
    """Other processes at the same database."""

    def test_mapped(self) -> None:
        """S14: the cheap way to notice commits is the one in use."""
        self.assertIsInstance(self.database._mark, changes.MappedMark)

    def use_pragma(self) -> None:
        self.database._mark = changes.PragmaMark(self.database._connection)

    def check_notices(self) -> None:
        self.add("a")
        self.assertTrue(self.database.is_valid(item("a")))
        self.database.path_info(item("a"))
        self.assertFalse(self.database.is_valid(item("b")))
        self.foreign(
            "DELETE FROM ValidPaths",
            "INSERT INTO ValidPaths (path, hash, registrationTime)"
            f" VALUES ('{item('b')}', 'sha256:{HASH.hex()}', 5)",
        )
        self.assertEqual(self.database.valid_paths([item("a"), item("b")]), {item("b")})
        self.assertFalse(self.database.is_valid(item("a")))
        self.assertIsNone(self.database.find_path_info(item("a")))
        self.assertEqual(self.database.path_info(item("b")), PathInfo(item("b"), HASH, 0, (), 5))

    def test_notices(self) -> None:
        """S14: what another process commits is seen at once."""
        self.check_notices()

    def test_notices_with_pragma(self) -> None:
        """S14: so it is where the WAL index is not mapped."""
        self.use_pragma()
        self.check_notices()

    def check_remembers(self) -> None:
        self.add("a")
        info = self.database.path_info(item("a"))
        self.add("b")
        self.database.add_failed([item("x")])
        self.assertIs(self.database.path_info(item("a")), info)

    def test_remembers(self) -> None:
        """S14: commits of our own do not make us forget."""
        self.check_remembers()

    def test_remembers_with_pragma(self) -> None:
        """S14: neither where the WAL index is not mapped."""
        self.use_pragma()
        self.check_remembers()

    def test_foreign_commit_during_ours(self) -> None:
        """S14: row numbers are looked up again inside a transaction."""
        self.add("a")
        self.database.is_valid(item("a"))
        self.foreign("DELETE FROM ValidPaths")
        self.assertRaises(PathNotValid, self.database.register, [registration("b", "a")])
        self.assertFalse(self.database.is_valid(item("b")))

    def test_commit_count_of_others(self) -> None:
        """S14: two commits where one was ours mean that one was not."""
        first = self.database._mark.raw
        self.add("a")
        second = self.database._mark.raw
        self.add("b")
        third = self.database._mark.raw
        self.assertTrue(self.database._mark.only_mine(first, second))
        self.assertFalse(self.database._mark.only_mine(first, third))

    def test_busy(self) -> None:
        """S14: a writer elsewhere delays us for a moment only, and reading never."""
        other = sqlite3.connect(self.directory + "/db.sqlite", isolation_level=None)
        self.addCleanup(other.close)
        self.add("a")
        other.execute("BEGIN IMMEDIATE")
        self.assertRaises(Busy, self.add, "b")
        self.assertRaises(Busy, self.database.invalidate, item("a"))
        self.assertTrue(self.database.is_valid(item("a")))
        self.assertEqual(self.database.all_valid_paths(), [item("a")])
        other.execute("ROLLBACK")
        self.add("b")

    def test_reader_sees_one_state(self) -> None:
        """S14: a reader in a thread does not need the writer."""
        reader = self.database.read_only_copy()
        self.addCleanup(reader.close)
        self.add("a")
        self.assertEqual(reader.all_valid_paths(), [item("a")])
        self.assertEqual(reader.closure([item("a")]), {item("a")})
        self.assertRaises(
            sqlite3.OperationalError, reader._connection.execute, "DELETE FROM ValidPaths"
        )

    def test_checkpoint(self) -> None:
        """S14: the log can be copied beside; nothing is lost or forgotten wrongly."""
        self.add("a")
        self.database.checkpoint()()
        self.assertTrue(self.database.is_valid(item("a")))
        self.add("b", "a")
        self.assertEqual(self.open().all_valid_paths(), [item("a"), item("b")])

    def test_checkpoint_due(self) -> None:
        """S14: it is due after many commits, and not again at once."""
        self.patch(database_module, "_CHECKPOINT_PAGES", 10)
        self.database.checkpoint()()
        self.assertFalse(self.database.checkpoint_due())
        for n in range(10):
            self.add(str(n))
        self.assertTrue(self.database.checkpoint_due())
        self.database.checkpoint()()
        self.assertFalse(self.database.checkpoint_due())
        self.add("a")  # the log begins anew
        self.assertFalse(self.database.checkpoint_due())
        for n in range(10):
            self.add(f"x{n}")
        self.assertTrue(self.database.checkpoint_due())

    def test_bounded_memory(self) -> None:
        """S14: asking for many names does not fill the memory."""
        self.patch(database_module, "_MAXIMUM_KNOWN", 10)
        self.patch(database_module, "_MAXIMUM_INFOS", 3)
        for n in range(25):
            self.add(str(n))
            self.assertFalse(self.database.is_valid(item(f"x{n}")))
            self.database.valid_paths([item(f"y{n}{m}") for m in range(4)])
            self.assertLessEqual(len(self.database._known), 10)
            self.assertLessEqual(len(self.database._infos), 3)
        self.assertEqual(len(self.database.valid_paths(map(item, map(str, range(25))))), 25)
