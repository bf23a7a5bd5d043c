"""Sharing the equal files of the whole store."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from guixd.client import Client
from guixd.formats import operations as op
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from guixd.service import sweep
from guixd.service.session import Session
from guixd.store.optimise import Optimisation
from tests.archives import File, Tree, archive
from tests.service.world import DaemonCase, set_options

LARGE = b"large" * 2000


class OptimiseTests(DaemonCase):
    options = {"deduplicate": False}

    async def items(self, client: Client) -> list[StorePath]:
        """Add items with equal files."""
        tree: Tree = {
            b"sub": {b"x": File(LARGE), b"y": File(LARGE, True), b"z": File(b"small")},
            b"x": File(LARGE),
        }
        return [
            await client.add_nar("tree", [archive(tree)]),
            await client.add_nar("file", [nar_of_file(LARGE)]),
            await client.add_text("text", LARGE),
            await client.add_text("other", LARGE[::-1]),
        ]

    async def test_optimise(self) -> None:
        """S17, S18, S20: equal files become one; the second time there is nothing to do."""
        client = await self.client()
        tree, file, text, other = await self.items(client)
        self.assertEqual(os.listdir(self.store.path + "/.links"), [])
        await client.optimise_store()
        self.assertEqual(self.log, [b"  29.30 KiB freed by hard-linking 3 files\n"])
        for path in f"{tree}/x", f"{tree}/sub/x", file, text:
            self.assertEqual(os.stat(path).st_nlink, 5)
        for path in f"{tree}/sub/y", other:
            self.assertEqual(os.stat(path).st_nlink, 2)
        self.assertEqual(os.stat(f"{tree}/sub/z").st_nlink, 1)
        for path in tree, f"{tree}/sub":
            status = os.stat(path)
            self.assertEqual(stat.S_IMODE(status.st_mode), 0o555)
            self.assertEqual(status.st_mtime_ns, 10**9)
        self.log.clear()
        await client.optimise_store()
        self.assertEqual(self.log, [b"   0  bytes freed by hard-linking 0 files\n"])

    async def test_large_files(self) -> None:
        """S17: files of more than one block have the same keys as when they are added."""
        client = await self.client()
        first, second = [await client.add_text(name, b"1" * 600_000) for name in ("a", "b")]
        await client.optimise_store()
        self.assertEqual(os.stat(first).st_ino, os.stat(second).st_ino)
        await client.set_options(set_options(("auto-optimise-store", "true")))
        added = await client.add_text("c", b"1" * 600_000)
        self.assertEqual(os.stat(first).st_ino, os.stat(added).st_ino)

    async def test_strange_paths(self) -> None:
        """S20: what is valid but not there, or not in the store, is passed over."""
        client = await self.client()
        gone, there, twin = [await client.add_text(name, LARGE) for name in ("a", "b", "c")]
        os.unlink(gone)
        outside = Path(self.directory, "outside")
        outside.write_bytes(LARGE)
        database = self.daemon.service.daemon._store.database  # type: ignore[union-attr]
        for path in str(outside), f"{self.store.path}/..", f"{self.store.path}/x/y":
            database._writer.execute(
                "INSERT INTO ValidPaths (path, hash, registrationTime) VALUES (?, 'x', 1)", (path,)
            )
        await client.optimise_store()
        self.assertEqual(self.log, [b"   9.77 KiB freed by hard-linking 1 files\n"])
        self.assertEqual(os.stat(there).st_ino, os.stat(twin).st_ino)
        self.assertEqual(os.stat(outside).st_nlink, 1)

    async def test_others_go_on(self) -> None:
        """Requests of others are served while a thread is at work; progress is told."""
        self.patch(sweep, "PROGRESS", 0.0)
        client = await self.client()
        items = await self.items(client)
        share, begun, go_on = Optimisation.share, Deferred[None](), Deferred[None]()

        def slow(work: Optimisation, names: list[str]) -> object:
            import threading

            wait = threading.Event()
            go_on.addCallback(lambda _: wait.set())
            reactor.callFromThread(begun.callback, None)
            wait.wait(20)
            return share(work, names)

        self.patch(Optimisation, "share", slow)
        done = client.optimise_store()
        await begun
        other = await self.client()
        self.assertTrue(await other.is_valid_path(items[0]))
        await other.add_text("new", b"new")
        go_on.callback(None)
        await done

    async def test_leaving(self) -> None:
        """P27: the work of a client that leaves ends, and gives back what it protected."""
        client = await self.client()
        await self.items(client)
        begun: Deferred[Optimisation] = Deferred()
        share = Optimisation.share

        def slow(work: Optimisation, names: list[str]) -> object:
            reactor.callFromThread(begun.callback, work)
            while not work.is_stopped():
                os.sched_yield()
            return share(work, names)

        self.patch(Optimisation, "share", slow)
        ended: Deferred[None] = Deferred()
        disconnected = Session.disconnected

        def watched(session: Session) -> None:
            disconnected(session)
            if not ended.called:
                ended.callback(None)

        raw = await self.raw(None, op.OptimiseStore())
        work = await begun
        self.patch(Session, "disconnected", watched)
        raw.transport.loseConnection()
        await ended
        self.assertTrue(work.is_stopped())
        await deferLater(reactor, 0)
        roots = os.listdir(self.directory + "/var/temproots")
        self.assertEqual(len(roots), 2)  # the other client's and the daemon's own
        self.assertEqual(os.listdir(self.store.path + "/.links"), [])

    async def test_corrupted_link(self) -> None:
        """S19: the client reads of entries that were replaced."""
        client = await self.client()
        await client.set_options(set_options(verbosity=1))
        _, file, *_ = await self.items(client)
        await client.optimise_store()
        inode = os.stat(file).st_ino
        (entry,) = [e for e in os.scandir(self.store.path + "/.links") if e.inode() == inode]
        os.unlink(entry.path)
        Path(entry.path).write_bytes(b"?")
        fresh = await client.add_text("fresh", LARGE)
        self.log.clear()
        await client.optimise_store()
        self.assertIn(f"corrupted link '{entry.path}'".encode(), b"".join(self.log))
        self.assertEqual(os.stat(fresh).st_ino, os.stat(entry.path).st_ino)
