"""A database or a disk that is not as it should be: an error for who asks, and no end."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from pathlib import Path

from twisted.internet.defer import Deferred

from guixd.client import Client, RequestFailed
from guixd.formats.messages import LAST, Greeting
from guixd.formats.path import StorePath
from guixd.service.clientlog import ClientLog
from guixd.store.schema import database_file
from tests.service.world import DaemonCase, set_options
from tests.support import requires_root

NOBODY = 65534


class TroubleCase(DaemonCase):
    @property
    def database(self) -> str:
        return database_file(self.directory + "/var/db")

    async def restart(self) -> None:
        await self.daemon.stop()
        self.begin()

    def begin(self) -> None:
        self.daemon = self.make(builder=self.builder, **self.options)
        self.daemon.start()
        self.addCleanup(self.daemon.stop)

    async def refusal(self) -> str:
        """Return the error that a new client gets."""
        try:
            await self.client()
        except RequestFailed as error:
            return error.text
        raise AssertionError("was let in")


class DatabaseTests(TroubleCase):
    async def test_schema(self) -> None:
        """S9: other versions, or none, are an error for each client until it is right again."""
        client = await self.client()
        path = await client.add_text("x", b"1")
        await self.restart()
        schema = Path(self.directory, "var/db/schema")
        for text, reason in ((b"8", "newer"), (b"6", "older"), (b"7\n", "corrupt"), (b"", "")):
            schema.write_bytes(text)
            for _ in range(2):
                self.assertIn(reason, await self.refusal())
        schema.write_bytes(b"7")
        client = await self.client()
        self.assertTrue(await client.is_valid_path(path))

    async def test_missing(self) -> None:
        """S9: a database that is gone is not made anew."""
        await (await self.client()).add_text("x", b"1")
        await self.restart()
        os.rename(self.database, self.database + "-away")
        self.assertIn("is missing", await self.refusal())
        self.assertFalse(os.path.exists(self.database))
        os.rename(self.database + "-away", self.database)
        await self.client()

    async def test_damaged(self) -> None:
        """S9: one that is damaged, at its beginning or in the middle, is called so."""
        client = await self.client()
        path = await client.add_text("x", b"1")
        await self.restart()
        good = Path(self.database).read_bytes()
        Path(self.database).write_bytes(b"no database at all" * 100)
        for _ in range(2):
            self.assertIn("is damaged", await self.refusal())
        Path(self.database).write_bytes(good[:4096] + b"\xff" * (len(good) - 4096))
        self.assertIn("is damaged", await self.refusal())
        Path(self.database).write_bytes(good)
        client = await self.client()
        self.assertTrue(await client.is_valid_path(path))

    async def test_damaged_while_open(self) -> None:
        """S9: requests that meet damage are errors; others are served."""
        client = await self.client()
        path = await client.add_text("x", b"1")
        await self.restart()
        connection = sqlite3.connect(self.database)
        ((page,),) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_FailedPaths_1'"
        )
        connection.close()
        with Path(self.database).open("r+b") as file:
            file.seek(4096 * (page - 1))
            file.write(b"\xff" * 4096)
        client = await self.client()
        self.assertIn("damaged", await self.fails(client.failed_paths()))
        self.assertTrue(await client.is_valid_path(path))
        await client.add_text("y", b"2")


class BusyTests(TroubleCase):
    """Foreign processes at the same database."""

    async def busy_client(self) -> tuple[Client, Deferred[None]]:
        """Return a client, and what fires when one is told that it has to wait."""
        client = await self.client()
        await client.set_options(set_options(verbosity=1))
        told: Deferred[None] = Deferred()
        log = ClientLog.log

        def watched(of: ClientLog, level: int, text: str) -> None:
            log(of, level, text)
            if text.endswith("; waiting") and not told.called:
                told.callback(None)

        self.patch(ClientLog, "log", watched)
        return client, told

    def foreign(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.database, isolation_level=None)
        self.addCleanup(connection.close)
        return connection

    async def test_writer(self) -> None:
        """S14: who must wait for a foreign writer is told, and never fails."""
        client, told = await self.busy_client()
        path = await client.add_text("x", b"1")
        foreign = self.foreign()
        foreign.execute("BEGIN IMMEDIATE")
        adding = client.add_text("y", b"2")
        await told
        other = await self.client()
        self.assertTrue(await other.is_valid_path(path))
        foreign.execute("ROLLBACK")
        self.assertTrue(await client.is_valid_path(await adding))

    async def test_reader(self) -> None:
        """S14: a foreign reader that stays for long is in nobody's way."""
        client = await self.client()
        await client.add_text("x", b"1")
        foreign = self.foreign()
        foreign.execute("BEGIN")
        self.assertEqual(len(foreign.execute("SELECT path FROM ValidPaths").fetchall()), 1)
        await client.add_text("y", b"2")
        store = self.daemon.service.daemon._store
        assert store is not None
        store.database.checkpoint()()
        await client.add_text("z", b"3")
        self.assertEqual(len(await client.all_valid_paths()), 3)
        self.assertEqual(len(foreign.execute("SELECT path FROM ValidPaths").fetchall()), 1)

    async def test_vacuum(self) -> None:
        """S14: what is remembered is true after the file has been vacuumed, too."""
        client = await self.client()
        paths = [await client.add_text(f"x{number}", b"1") for number in range(30)]
        foreign = self.foreign()
        foreign.execute("DELETE FROM ValidPaths WHERE path = ?", (str(paths[0]),))
        foreign.execute("VACUUM")
        self.assertEqual(set(await client.all_valid_paths()), set(paths[1:]))
        self.assertFalse(await client.is_valid_path(paths[0]))
        self.assertEqual(await client.add_text("x0", b"1"), paths[0])
        self.assertTrue(await client.is_valid_path(paths[0]))


@requires_root
class ReadOnlyTests(TroubleCase):
    """S9: a daemon that may not write to the database."""

    async def test_read_only(self) -> None:
        """Questions are answered; changes are errors that say why."""
        client = await self.client()
        path = await client.add_text("x", b"1")
        await self.daemon.stop()
        # SQLite needs the files of its log, which are there as long as somebody else reads.
        keeper = sqlite3.connect(self.database)
        self.addCleanup(keeper.close)
        keeper.execute("SELECT 1 FROM ValidPaths").fetchall()
        os.chmod(self.directory + "/var/daemon-socket", 0o777)
        os.seteuid(NOBODY)
        try:
            self.begin()
            client = await self.client()
            self.assertTrue(await client.is_valid_path(path))
            self.assertEqual(await client.all_valid_paths(), (path,))
            self.assertEqual((await client.path_info(path)).nar_size, 120)
            self.assertIn("ermission denied", await self.fails(client.add_text("y", b"2")))
            self.assertIn("read-only", await self.fails(client.clear_failed_paths(["*"])))
            self.assertTrue(await client.is_valid_path(path))
            await self.daemon.stop()
        finally:
            os.seteuid(0)


@requires_root
class FullDiskTests(TroubleCase):
    """S11: all of it on a small disk."""

    options = {"deduplicate": False}

    def make(self, **options: object) -> object:  # type: ignore[override]
        if not os.path.ismount(self.directory):
            mount = ["mount", "-t", "tmpfs", "-o", "size=20m,mode=755", "none", self.directory]
            subprocess.run(mount, check=True)
            self.addCleanup(subprocess.run, ["umount", "-l", self.directory], check=True)
        return super().make(**options)

    async def test_full(self) -> None:
        """S11: what does not fit is an error; the reserved space lets others go on."""
        client = await self.client()
        added: list[StorePath] = []
        for size in 20_000, 1:
            with self.assertRaisesRegex(RequestFailed, "space|full"):
                for number in range(5000):
                    added += [await client.add_text(f"{size}-{number}", b"%d" % number * size)]
        self.assertEqual(set(await client.all_valid_paths()), set(added))
        self.assertFalse(await client.verify_store(check_contents=True))
        # Who collects garbage gets what is reserved, although guix does not ask for it.
        client.close()
        client = await self.client()
        path = added.pop()
        filler = Path(self.directory, "filler")
        with self.assertRaises(OSError), filler.open("wb", 0) as file:
            while True:
                file.write(bytes(4096))
        self.assertGreater((await client.collect_garbage(3, [path])).freed, 0)
        self.assertTrue(os.path.exists(self.directory + "/var/db/reserved"))
        filler.unlink()
        raw = await self.raw(greeting=Greeting(reserve_space=False))
        await raw.received(LAST)
        added.append(await client.add_text("z", b"3"))
        self.assertEqual(set(await client.all_valid_paths()), set(added))
        connection = sqlite3.connect(self.database)
        self.addCleanup(connection.close)
        self.assertEqual(connection.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
