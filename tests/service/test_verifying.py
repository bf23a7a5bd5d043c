"""Comparing the store with what the database says of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred

from guixd.client import Client
from guixd.formats import operations as op
from guixd.formats.nar import nar_of_file
from guixd.service import sweep
from guixd.service.session import Session
from guixd.store.items import Row
from guixd.store.local import LocalStore
from guixd.store.locks import FileLock
from guixd.store.verify import Finding, Verification
from tests.archives import VECTOR, archive
from tests.service.test_real_builds import PlayedCase
from tests.service.world import DaemonCase, set_options

READING = ["reading the store...", "checking path existence..."]
HASHES = [*READING, "checking hashes..."]


class VerifyCase(DaemonCase):
    async def ready(self) -> Client:
        """Return a client that sees what a user sees."""
        client = await self.client()
        await client.set_options(set_options(verbosity=1))
        return client

    @property
    def lines(self) -> list[str]:
        """Return what was logged since the last time."""
        lines = b"".join(self.log).decode().splitlines()
        self.log.clear()
        return lines

    @property
    def local(self) -> LocalStore:
        store = self.daemon.service.daemon._store
        assert store is not None
        return store

    def overwrite(self, path: str, contents: bytes) -> None:
        os.chmod(path, 0o644)
        Path(path).write_bytes(contents)
        os.chmod(path, 0o444)

    def execute(self, statement: str, *parameters: object) -> None:
        """Change the database as another program might."""
        self.local.database._connection.execute(statement, parameters)


class VerifyTests(VerifyCase):
    async def test_good(self) -> None:
        """S21: small and large files, trees and links are found as they should be."""
        client = await self.ready()
        await client.add_text("small", b"1")
        await client.add_text("large", b"1" * 100_000)
        await client.add_nar("tree", [archive(VECTOR)])
        await client.add_nar("executable", [nar_of_file(b"#!", True)])
        link = self.directory + "/link"
        os.symlink("somewhere", link)
        await client.add_tree("link", link)
        self.assertFalse(await client.verify_store())
        self.assertEqual(self.lines, READING)
        self.assertFalse(await client.verify_store(check_contents=True))
        self.assertEqual(self.lines, HASHES)

    async def test_modified(self) -> None:
        """S21: what has other contents is told in the order of names, with both hashes."""
        client = await self.ready()
        paths = sorted([await client.add_text(f"t{n}", b"%d" % n) for n in range(150)])
        wrong = paths[3], paths[70], paths[149]
        for path in wrong:
            self.overwrite(path, b"other")
        self.assertFalse(await client.verify_store())
        self.assertEqual(self.lines, READING)
        self.assertTrue(await client.verify_store(check_contents=True))
        actual = hashlib.sha256(nar_of_file(b"other")).hexdigest()
        expected = [
            f"path `{path}' was modified! expected hash"
            f" `{(await client.path_info(path)).nar_hash}', got `{actual}'"
            for path in wrong
        ]
        self.assertEqual(self.lines, HASHES + expected)

    async def test_lost(self) -> None:
        """S21: an item without referrers is dropped; others stay, and that is an error."""
        client = await self.ready()
        alone = await client.add_text("alone", b"1")
        needed = await client.add_text("needed", b"2")
        user = await client.add_text("user", b"3", [needed])
        chain = [await client.add_text("chain-a", b"a")]
        for name in "bc":
            chain.append(await client.add_text(f"chain-{name}", b"", [chain[-1]]))
        for path in (alone, needed, *chain):
            os.unlink(path)
        self.assertTrue(await client.verify_store(check_contents=True))
        lines = self.lines
        gone = [alone, *chain]
        self.assertEqual(
            set(lines),
            {f"path `{path}' disappeared, removing from database..." for path in gone}
            | {f"path `{needed}' disappeared, but it still has valid referrers!"}
            | set(HASHES),
        )
        valid = await client.valid_paths([alone, needed, user, *chain])
        self.assertEqual(set(valid), {needed, user})
        self.log.clear()
        os.unlink(user)
        self.assertFalse(await client.verify_store())
        self.assertEqual(
            self.lines[2:],
            [f"path `{path}' disappeared, removing from database..." for path in (user, needed)],
        )

    async def test_many_lost(self) -> None:
        """S21: as many as there are."""
        client = await self.ready()
        for number in range(120):
            os.unlink(await client.add_text(f"t{number}", b""))
        self.assertFalse(await client.verify_store())
        self.assertEqual(len(await client.all_valid_paths()), 0)

    async def test_strange_rows(self) -> None:
        """S21: items outside of the store are dropped; hashes that are none are errors."""
        client = await self.ready()
        path = await client.add_text("x", b"1")
        for name in "/elsewhere/x", self.store.path + "/x/y", self.store.path + "/..":
            self.execute(
                "INSERT INTO ValidPaths (path, hash, registrationTime) VALUES (?, 'x', 1)", name
            )
        self.assertFalse(await client.verify_store())
        self.assertEqual(len(self.lines), 5)
        self.assertEqual(await client.all_valid_paths(), (path,))
        self.execute("UPDATE ValidPaths SET hash = 'nonsense'")
        self.assertTrue(await client.verify_store(check_contents=True))
        self.assertIn("expected hash `nonsense'", self.lines[-1])

    async def test_unknown(self) -> None:
        """S21: a hash or a size that the database does not know is filled in."""
        client = await self.ready()
        first, second = [await client.add_text(name, b"1") for name in ("x", "y")]
        infos = [await client.path_info(path) for path in (first, second)]
        self.execute(
            "UPDATE ValidPaths SET hash = ?, narSize = 9 WHERE path = ?",
            "sha256:" + 64 * "0",
            str(first),
        )
        self.execute("UPDATE ValidPaths SET narSize = NULL WHERE path = ?", str(second))
        self.assertFalse(await client.verify_store(check_contents=True))
        self.assertEqual(len(self.lines), 5)
        self.assertEqual([await client.path_info(path) for path in (first, second)], infos)

    async def test_unreadable(self) -> None:
        """S21: what has become something else than an item is an error, and is named."""
        client = await self.ready()
        path = await client.add_text("x", b"1")
        os.unlink(path)
        os.mkfifo(path)
        self.assertTrue(await client.verify_store(check_contents=True))
        self.assertIn(path.base, self.lines[-1])

    async def test_privilege(self) -> None:
        """P18: only who is trusted may repair; the connection goes on."""
        client = await self.ready()
        trusted = Session.__init__

        def not_trusted(session: Session, *arguments: object) -> None:
            trusted(session, *arguments)  # type: ignore[arg-type]
            session.trusted = False

        self.patch(Session, "__init__", not_trusted)
        other = await self.client()
        self.assertIn("privileged", await self.fails(other.verify_store(repair=True)))
        self.assertFalse(await other.verify_store())
        self.assertFalse(await client.verify_store(repair=True))

    async def test_nothing_to_repair_with(self) -> None:
        """P18: what nothing is known of cannot be repaired."""
        client = await self.ready()
        needed, modified = [await client.add_text(name, b"1") for name in ("x", "y")]
        await client.add_text("user", b"", [needed])
        os.unlink(needed)
        self.overwrite(modified, b"2")
        self.assertTrue(await client.verify_store(check_contents=True, repair=True))
        lines = self.lines
        self.assertEqual(
            lines[2:5],
            [
                f"path `{needed}' disappeared, but it still has valid referrers!",
                f"warning: cannot repair path `{needed}'",
                HASHES[-1],
            ],
        )
        self.assertIn(f"path `{modified}' was modified!", lines[5])
        self.assertEqual(lines[6:], [f"error: cannot repair path `{modified}'"])


class MeanwhileTests(VerifyCase):
    """What others do while a store is verified."""

    async def test_collected(self) -> None:
        """S21: what was collected after it had been listed is no error."""
        client = await self.ready()
        path = await client.add_text("x", b"1")
        check, local = Verification.check, self.local

        def late(work: Verification, rows: Sequence[Row]) -> list[Finding]:
            if local.is_valid(path):
                local.invalidate(path)
                os.unlink(path)
            return check(work, rows)

        self.patch(Verification, "check", late)
        self.assertFalse(await client.verify_store(check_contents=True))
        self.assertEqual(self.lines, HASHES)

    async def test_added(self) -> None:
        """S21: what was added while names were read has not disappeared."""
        client = await self.ready()
        path = await client.add_text("x", b"1")
        listdir = os.listdir

        def early(directory: str) -> list[str]:
            names = listdir(directory)
            if directory == self.store.path:
                names.remove(path.base)
            return names

        self.patch(os, "listdir", early)
        self.assertFalse(await client.verify_store())
        self.assertTrue(await client.is_valid_path(path))
        self.assertEqual(self.lines, READING)

    async def test_collector(self) -> None:
        """G6: while another process collects, nothing is dropped."""
        client = await self.ready()
        path = await client.add_text("x", b"1")
        os.unlink(path)
        lock = FileLock(self.local.gc_lock_file)
        self.addCleanup(lock.close)
        lock.acquire(exclusive=True)
        waiting: Deferred[None] = Deferred()
        when_free = Session.when_free

        def watched(session: Session, step: object) -> object:
            if not waiting.called and "Collecting.begin" in repr(step):
                waiting.callback(None)
            return when_free(session, step)  # type: ignore[arg-type]

        self.patch(Session, "when_free", watched)
        done = client.verify_store()
        await waiting
        self.assertTrue(self.local.is_valid(path))
        lock.release()
        self.assertFalse(await done)
        self.assertFalse(self.local.is_valid(path))

    async def test_leaving(self) -> None:
        """P27: the threads that read for a client that leaves come to an end."""
        client = await self.ready()
        await client.add_text("x", b"1")
        begun: Deferred[Verification] = Deferred()
        ended: Deferred[None] = Deferred()
        check = Verification.check

        def slow(work: Verification, rows: Sequence[Row]) -> list[Finding]:
            reactor.callFromThread(begun.callback, work)
            while not work._stopped:
                os.sched_yield()
            try:
                return check(work, rows)
            finally:
                reactor.callFromThread(ended.callback, None)

        self.patch(Verification, "check", slow)
        raw = await self.raw(None, op.VerifyStore(True, False))
        await begun
        raw.transport.loseConnection()
        await ended

    async def test_progress(self) -> None:
        """The client is told how far it is."""
        self.patch(sweep, "PROGRESS", 0.0)
        client = await self.ready()
        await client.add_text("x", b"1")
        await client.verify_store(check_contents=True)
        self.assertEqual(self.lines, [*HASHES, "1 items checked"])


class RepairTests(PlayedCase, VerifyCase):
    async def test_repair(self) -> None:
        """P18, B16: what a derivation has made is made again, be it modified or gone."""
        drv = await self.build()
        client = await self.ready()
        (out,) = await client.derivation_outputs(drv)
        user = await client.add_text("user", b"", [out])
        self.overwrite(out, b"bad")
        self.assertFalse(await client.verify_store(check_contents=True, repair=True))
        self.assertEqual(Path(out).read_text(), self.made)
        lines = self.lines
        self.assertTrue(any(f"path `{out}' was modified!" in line for line in lines))
        self.assertFalse(any("cannot repair" in line for line in lines), lines)
        os.unlink(out)
        self.assertFalse(await client.verify_store(repair=True))
        self.assertIn(f"path `{out}' disappeared, but it still has valid referrers!", self.lines)
        self.assertEqual(Path(out).read_text(), self.made)
        self.assertTrue(await client.is_valid_path(user))
        self.assertFalse(await client.verify_store(check_contents=True))

    async def test_deriver_lost(self) -> None:
        """P18: without its deriver an output cannot be repaired."""
        drv = await self.build()
        client = await self.ready()
        (out,) = await client.derivation_outputs(drv)
        self.overwrite(out, b"bad")
        self.local.invalidate(drv)
        self.assertTrue(await client.verify_store(check_contents=True, repair=True))
        self.assertEqual(self.lines[-1], f"error: cannot repair path `{out}'")
        self.assertEqual(Path(out).read_text(), "bad")
