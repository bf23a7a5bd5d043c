"""The daemon as a service and as a program."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from twisted.application.service import IServiceCollection
from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from guixd.client import RequestFailed
from guixd.errors import GuixdError
from guixd.formats.messages import LAST, Greeting
from guixd.formats.nar import nar_of_file
from guixd.service.daemon import GuixdService
from guixd.service.listening import ListenError
from guixd.service.tap import Options, makeService
from guixd.settings import Settings
from guixd.store import database
from guixd.store.durability import Durability
from guixd.testing import directories_below
from tests.service.world import DaemonCase, set_options
from tests.support import requires_root, temporary_directory


class StartTests(DaemonCase):
    tcp = True

    async def test_lazy_store(self) -> None:
        """O11: nothing of the store is made before the first session."""
        self.assertEqual(sorted(os.listdir(self.directory)), ["tmp", "var"])
        self.assertEqual(os.listdir(self.directory + "/var"), ["daemon-socket"])
        await self.client()
        self.assertTrue(os.path.exists(self.directory + "/var/db/db.sqlite"))

    async def test_endpoints(self) -> None:
        """O4: all endpoints lead to the same store."""
        path = await (await self.client()).add_text("x", b"y")
        self.assertTrue(await (await self.client(self.port)).is_valid_path(path))

    async def test_broken_store(self) -> None:
        """O11: each client reads what is wrong with the store, until it is repaired."""
        os.symlink("elsewhere", self.directory + "/store")
        os.mkdir(self.directory + "/elsewhere")
        for _ in range(2):
            try:
                await self.client()
            except RequestFailed as error:
                self.assertIn("symlink", error.text)
            else:
                self.fail("was let in")
        os.unlink(self.directory + "/store")
        client = await self.client()
        self.assertEqual(await client.all_valid_paths(), ())

    async def test_stop(self) -> None:
        """The socket, temporary roots and the log of the database go at the end."""
        client = await self.client()
        await client.add_temp_root(self.path("x"))
        await self.daemon.stop()
        self.assertEqual(os.listdir(self.directory + "/var/daemon-socket"), [])
        self.assertEqual(os.listdir(self.directory + "/var/temproots"), [])
        self.assertEqual(
            [name for name in os.listdir(self.directory + "/var/db") if "-wal" in name], []
        )

    async def test_long_log(self) -> None:
        """The log of the database is copied when it has become long."""
        self.patch(database, "_CHECKPOINT_PAGES", 8)
        copied: list[int] = []
        original = database.Database.checkpoint

        def checkpoint(of: database.Database) -> object:
            run = original(of)
            return lambda: copied.append(run() is None)

        self.patch(database.Database, "checkpoint", checkpoint)
        client = await self.client()
        for number in range(5):
            await client.add_text(f"x{number}", b"y")
        await self.daemon.stop()
        self.assertTrue(copied)

    async def test_reserve(self) -> None:
        """The file that reserves space is there as long as clients want it."""
        await self.client()
        reserved = self.directory + "/var/db/reserved"
        self.assertTrue(os.path.exists(reserved))
        for wanted in (False, True):
            client = await self.raw(greeting=Greeting(reserve_space=wanted))
            await client.received(LAST)
            self.assertEqual(os.path.exists(reserved), wanted)

    def test_parts(self) -> None:
        """Embedders find the parts by name."""
        parts = IServiceCollection(self.daemon.service)
        for name in ("store", "workers", "builds", "listeners", "discovering"):
            self.assertEqual(parts.getServiceNamed(name).name, name)


@requires_root
class GroupTests(DaemonCase):
    options = {"build_users_group": "no-such-group-here"}

    async def test_missing_group(self) -> None:
        """O12: the daemon runs, and each client reads which group is missing."""
        for _ in range(2):
            try:
                await self.client()
            except RequestFailed as error:
                self.assertIn("no-such-group-here", error.text)
            else:
                self.fail("was let in")


class RefusedStartTests(TestCase):
    def test_bad_endpoint(self) -> None:
        directory = temporary_directory(self)
        Path(directory, "file").touch()
        settings = Settings(directories_below(directory), listen=(directory + "/file",))
        service = GuixdService(reactor, settings, environ={})
        self.addCleanup(service.stopService)
        self.assertRaises(ListenError, service.startService)
        self.assertTrue(issubclass(ListenError, GuixdError))

    def test_make_service(self) -> None:
        """`twistd guixd` gets the same service."""
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        self.patch(reactor, "seconds", reactor.seconds)
        options = Options()
        options.parseOptions(["--listen=/nowhere"])
        service = makeService(options)
        self.assertEqual(service.settings.listen, ("/nowhere",))
        # Timers do not follow the machine's clock, which may be set.
        self.assertIs(reactor.seconds, time.monotonic)


class RecoveryTests(DaemonCase):
    options = {"durable": True}

    async def test_machine_stopped(self) -> None:
        """S16: after the machine has stopped, clients wait until what was lost is known."""
        client = await self.client()
        lost, good = [await client.add_text(name, b"1") for name in ("lost", "good")]
        await self.daemon.stop()
        os.unlink(lost)
        Path(self.directory, "var/db/flushed").write_text("another-start 0")
        self.daemon = self.make(builder=self.builder, **self.options)
        self.daemon.start()
        self.addCleanup(self.daemon.stop)
        client = await self.client()
        self.assertEqual(await client.all_valid_paths(), (good,))
        self.assertIn(b"machine stopped", b"".join(self.log))

    async def test_waiting_for_the_disk(self) -> None:
        """S16: a client that is trusted may let each reply wait for the disk."""
        flushed: list[int] = []
        settle_all = Durability.settle_all

        def watched(durability: Durability) -> None:
            settle_all(durability)
            flushed.append(durability._queries.last_row())

        self.patch(Durability, "settle_all", watched)
        client = await self.client()
        await client.add_text("a", b"1")
        self.assertEqual(flushed, [])
        await client.set_options(set_options(("sync-before-registering", "true")))
        path = await client.add_text("b", b"1")
        await client.add_nar("c", [nar_of_file(b"1")])
        await client.ensure_path(path)
        self.assertEqual(flushed, [2, 3, 3])
