"""Collecting garbage over a socket (spec: gc)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater

from guixd.client import Client
from guixd.formats import operations as op
from guixd.formats.path import StorePath
from guixd.store.collector import NO_LIMIT
from tests.service.world import DaemonCase
from tests.support import is_root

LIVE, DEAD, DELETE_DEAD, DELETE_SPECIFIC = range(4)
HOLDER = """
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
fcntl.fcntl(fd, fcntl.F_SETLKW, lock)
os.write(fd, sys.argv[2].encode("latin-1").replace(b"|", bytes(1)))
if sys.argv[3] == "hold":
    lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(fd, fcntl.F_SETLKW, lock)
    print("held", flush=True)
    sys.stdin.read()
"""


class CollectingCase(DaemonCase):
    async def collect(self, action: int = DELETE_DEAD, *paths: str, **more: Any) -> list[str]:
        """Let a new client collect; return the base names of what it got."""
        client = await self.client()
        collected = await client.collect_garbage(action, paths, **more)
        await client.close()
        self.freed = collected.freed
        self.assertEqual(list(collected.paths), sorted(collected.paths))
        return [path.base for path in collected.paths]

    async def texts(self, *names: str) -> list[StorePath]:
        """Add texts that nothing protects; each refers to the one before."""
        client = await self.client()
        paths: list[StorePath] = []
        for name in names:
            paths.append(await client.add_text(name, name.encode(), paths[-1:]))
        await client.close()
        return paths

    def root(self, path: str, name: str = "root") -> Path:
        """Make a permanent root."""
        link = Path(self.directory, "var/gcroots", name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
        return link

    def there(self, *paths: StorePath) -> list[bool]:
        return [os.path.lexists(path) for path in paths]


class SessionTests(CollectingCase):
    async def test_own_item(self) -> None:
        """G1: what a client has just added can be deleted by it."""
        client = await self.client()
        path = await client.add_text("a", b"a", ())
        collected = await client.collect_garbage(DELETE_SPECIFIC, [path])
        self.assertEqual(collected.paths, (path,))
        self.assertFalse(os.path.lexists(path))
        self.assertEqual(collected.freed, 1)
        self.assertEqual(await client.add_text("a", b"a", ()), path)
        self.assertTrue(os.path.lexists(path))

    async def test_item_of_another(self) -> None:
        """G2, G3: what another session protects stays as long as that lasts."""
        holder = await self.client()
        path = await holder.add_text("a", b"a", ())
        other = await self.client()
        text = await self.fails(other.collect_garbage(DELETE_SPECIFIC, [path]))
        self.assertEqual(text, f"cannot delete path `{path}' since it is still alive")
        self.assertTrue(await other.is_valid_path(path))
        await holder.close()
        collected = await other.collect_garbage(DELETE_SPECIFIC, [path])
        self.assertEqual(collected.paths, (path,))

    async def test_with_referrers(self) -> None:
        """G4: what refers to it goes, too, if it is dead."""
        first, second, third = await self.texts("a", "b", "c")
        names = await self.collect(DELETE_SPECIFIC, first)
        self.assertEqual(names, sorted([first.base, second.base, third.base]))
        self.assertEqual(self.there(first, second, third), [False] * 3)

    async def test_several(self) -> None:
        """G2: what comes before the first live one goes, what comes after it stays."""
        free = sorted([(await self.texts(f"t{number}"))[0] for number in range(6)])
        self.root(free[3])
        client = await self.client()
        text = await self.fails(client.collect_garbage(DELETE_SPECIFIC, [*free, self.path("no")]))
        self.assertEqual(text, f"cannot delete path `{free[3]}' since it is still alive")
        first = sorted([*free, self.path("no")])
        gone = [path for path in first[: first.index(free[3])] if path in free]
        self.assertEqual(list(await client.valid_paths(free)), sorted(set(free) - set(gone)))
        self.assertEqual(len(await self.collect(DELETE_SPECIFIC, *free[4:])), 2)

    async def test_several_to_a_limit(self) -> None:
        """G13: named items are deleted up to the limit, and the rest is no error."""
        client = await self.client()
        paths = [await client.add_text(f"t{n}", bytes(1000), ()) for n in range(6)]
        await client.close()
        self.assertEqual(len(await self.collect(DELETE_SPECIFIC, *paths, max_freed=2500)), 3)
        self.assertEqual(len(await self.collect(DELETE_SPECIFIC, *paths)), 3)

    async def test_what_is_not_there(self) -> None:
        """G5, G24: nothing to delete is no error; paths come first in the reply, then bytes."""
        for name in "nothing", "nul\0":
            names = await self.collect(DELETE_SPECIFIC, self.path(name))
            self.assertEqual((names, self.freed), ([], 0))
        client = await self.client()
        text = await self.fails(client.collect_garbage(DELETE_SPECIFIC, [self.path("x" * 300)]))
        self.assertIn("too long", text)

    async def test_store_itself(self) -> None:
        """Parts of the store are always alive."""
        client = await self.client()
        for name in (".links", "trash"):
            path = self.store.child(name)
            text = await self.fails(client.collect_garbage(DELETE_SPECIFIC, [path]))
            self.assertIn("still alive", text)

    async def test_roots_after_a_collection(self) -> None:
        """G27: what a client adds after its collection is safe from another's."""
        first = await self.client()
        await first.collect_garbage(DELETE_DEAD)
        path = await first.add_text("a", b"a", ())
        self.assertEqual(await self.collect(), [])
        self.assertTrue(await first.is_valid_path(path))

    async def test_unknown_action(self) -> None:
        """G23: refused, and the session goes on."""
        client = await self.client()
        self.assertIn("unknown action", await self.fails(client.collect_garbage(9)))
        wrong = op.CollectGarbage(DELETE_DEAD, (), True, NO_LIMIT)
        self.assertIn("not allowed", await self.fails(client.call(wrong)))
        self.assertEqual((await client.collect_garbage(DEAD)).paths, ())


class RootTests(CollectingCase):
    async def test_kinds(self) -> None:
        """G6, G7, G9: which links and files protect what."""
        client = await self.client()
        names = ("direct", "below", "file", "nested", "profile", "indirect", "far", "none")
        paths = {name: await client.add_text(name, name.encode(), ()) for name in names}
        await client.close()
        roots = Path(self.directory, "var/gcroots")
        self.root(paths["direct"])
        self.root(paths["below"] + "/sub/path", "below")
        (roots / paths["file"].base).touch()
        self.root(paths["nested"], "a/b/c")
        self.root(paths["profile"], "../profiles/per-user/me/profile")
        home = Path(self.directory, "home")
        home.mkdir()
        (home / "result").symlink_to(paths["indirect"])
        (home / "one").symlink_to("two")
        (home / "two").symlink_to(paths["far"])
        (home / "plain").mkdir()
        client = await self.client()
        for name in ("result", "one", "plain"):
            await client.add_indirect_root(str(home / name))
        kept = [name for name in names if name not in ("far", "none")]
        live = await self.collect(LIVE)
        self.assertEqual(live, sorted(paths[name].base for name in kept))
        gone = await self.collect()
        self.assertEqual(gone, sorted(paths[name].base for name in ("far", "none")))
        self.assertEqual(await self.collect(LIVE), live)

    async def test_closure(self) -> None:
        """What a live item refers to is alive; others are not."""
        first, second, third = await self.texts("a", "b", "c")
        self.root(second)
        self.assertEqual(await self.collect(LIVE), sorted([first.base, second.base]))
        self.assertEqual(await self.collect(DEAD), [third.base])
        self.assertEqual(self.freed, 0)
        self.assertEqual(await self.collect(), [third.base])
        self.assertEqual(self.there(first, second, third), [True, True, False])

    async def test_stale(self) -> None:
        """G8, G10: links that lead nowhere."""
        auto = Path(self.directory, "var/gcroots/auto")
        client = await self.client()
        await client.add_indirect_root(self.directory + "/missing")
        self.root(self.path("invalid"), "invalid")
        self.root("/nowhere", "dangling")
        self.assertEqual(len(list(auto.iterdir())), 1)
        await self.collect()
        self.assertEqual(list(auto.iterdir()), [])
        self.assertTrue((auto.parent / "dangling").is_symlink())

    async def test_busy(self) -> None:
        """G18: directory, open file and environment of a process keep an item."""
        tree = Path(self.directory, "tree")
        tree.mkdir()
        (tree / "file").write_text("text")
        client = await self.client()
        cwd = await client.add_tree("cwd", str(tree))
        opened, named, free = [
            await client.add_text(name, name.encode(), ()) for name in ("opened", "named", "free")
        ]
        await client.close()
        with Path(opened).open("rb") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", "import sys; print(1, flush=True); sys.stdin.read()"],
                cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                pass_fds=[file.fileno()], env={"PATHS": f"x:{named}/bin", "PATH": "/bin"},
            )  # fmt: skip
        with process:
            assert process.stdout is not None
            process.stdout.readline()
            self.assertEqual(await self.collect(), [free.base])
            process.communicate(b"")
        self.assertEqual(await self.collect(), sorted([cwd.base, opened.base, named.base]))

    async def test_unreadable(self) -> None:
        """Nothing is deleted where a root may be that cannot be read."""
        (path,) = await self.texts("a")
        closed = Path(self.directory, "var/gcroots/closed")
        closed.mkdir(parents=True)
        self.root(path, "closed/root")
        closed.chmod(0)
        self.addCleanup(closed.chmod, 0o700)
        if is_root():
            names = await self.collect()
            self.assertEqual(names, [])
        else:
            client = await self.client()
            text = await self.fails(client.collect_garbage(DELETE_DEAD))
            self.assertIn("closed", text)
            self.assertIn("nothing is deleted", text)
        self.assertTrue(os.path.lexists(path))


class OtherProcessTests(CollectingCase):
    def holder(self, name: str, text: str, how: str = "hold") -> subprocess.Popen[bytes]:
        """Let another process write TEXT into a file of temporary roots, with its lock."""
        file = Path(self.directory, "var/temproots", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(file), text, how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.addCleanup(process.communicate, b"")
        assert process.stdout is not None
        process.stdout.readline()
        return process

    async def test_alive(self) -> None:
        """G20: another daemon's session protects what it names; a dead one's does not."""
        kept, free = await self.texts("a"), await self.texts("b")
        self.holder("12345", kept[0] + "|")
        self.holder("12346", free[0] + "|", "die").wait()
        self.assertEqual(await self.collect(), [free[0].base])
        self.assertFalse(Path(self.directory, "var/temproots/12346").exists())
        self.assertTrue(Path(self.directory, "var/temproots/12345").exists())

    async def test_corrupt(self) -> None:
        """G21: a file with a bad entry is an error, and nothing is deleted."""
        (path,) = await self.texts("a")
        self.holder("12345", "/etc/passwd|")
        client = await self.client()
        self.assertIn("corrupt", await self.fails(client.collect_garbage(DELETE_DEAD)))
        self.assertTrue(await client.is_valid_path(path))

    async def test_lock(self) -> None:
        """A collection waits for another daemon's, and then goes on."""
        (path,) = await self.texts("a")
        lock = Path(self.directory, "var/gc.lock")
        process = self.holder("../gc.lock", "")
        self.assertTrue(lock.exists())
        client = await self.client()
        waiting = client.collect_garbage(DELETE_DEAD)
        with self.subTest("told"):
            while not self.log:
                await deferLater(reactor, 0.01)
            self.assertIn(b"waiting for the lock", self.log[0])
        self.assertTrue(os.path.lexists(path))
        process.communicate(b"")
        self.assertEqual((await waiting).paths, (path,))


class LeftoverTests(CollectingCase):
    async def test_kinds(self) -> None:
        """G14, G25, G26: what is no item goes, without following links out of it."""
        canary = Path(self.directory, "canary")
        canary.mkdir()
        (canary / "file").write_text("mine")
        store = Path(self.store.path)
        await self.client()
        tree = store / ("0" * 32 + "-x-check")
        (tree / "closed").mkdir(parents=True)
        (tree / "closed/link").symlink_to(canary)
        (tree / "closed/file").write_text("")
        (tree / "closed").chmod(0o500)
        (store / "link").symlink_to(canary)
        (store / "junk").write_text("junk")
        (store / ("0" * 32 + "-y.lock")).touch()
        expected = ["0" * 32 + "-x-check", "0" * 32 + "-y.lock", "junk", "link"]
        self.assertEqual(await self.collect(DEAD), expected)
        self.assertEqual(await self.collect(), expected)
        self.assertEqual(os.listdir(store), [".links"])
        self.assertEqual((canary / "file").read_text(), "mine")

    async def test_interrupted_before(self) -> None:
        """G16: what a collector has made invalid but not removed is removed by the next one."""
        (path,) = await self.texts("a")
        daemon = self.daemon.service.daemon
        daemon.open_store(True).invalidate(path)
        trash = Path(self.store.path, "trash/old")
        trash.mkdir(parents=True)
        (trash / "file").write_bytes(b"12345")
        self.assertEqual(await self.collect(), [path.base])
        self.assertEqual(self.freed, 6)
        self.assertFalse(trash.parent.exists())

    async def test_of_live_additions(self) -> None:
        """G15: locks, roots of containers and staging places of what is being made stay."""
        client = await self.client()
        path = self.path("x.drv")
        await client.add_temp_root(path)
        for ending in (".lock", ".chroot"):
            Path(path + ending).touch()
        Path(self.path("y") + ".lock").touch()
        staging = self.daemon.service.daemon.open_store(True).staging.take()
        Path(staging).touch()
        self.assertEqual(await self.collect(), [self.path("y").base + ".lock"])
        self.assertTrue(Path(staging).exists())


class AccountingTests(CollectingCase):
    async def test_limits(self) -> None:
        """G13: no bytes delete nothing; few end it early."""
        client = await self.client()
        for number in range(20):
            await client.add_text(f"t{number}", bytes(1000), ())
        await client.close()
        self.assertEqual(await self.collect(max_freed=0), [])
        names = await self.collect(max_freed=4500)
        self.assertEqual(len(names), 5)
        self.assertEqual(self.freed, 5000)
        self.assertEqual(len(await self.collect()), 15)

    async def test_shared_files(self) -> None:
        """G17: files of the pool count when nobody has them any more, and then go."""
        client = await self.client()
        for name, data in (("a", bytes(8191)), ("b", bytes(8192)), ("c", b"x" * 8192)):
            await client.add_tree(name, self.file(data))
        kept = await client.add_tree("d", self.file(b"y" * 8192))
        await client.close()
        self.root(kept)
        pool = Path(self.store.path, ".links")
        self.assertEqual(len(list(pool.iterdir())), 3)
        (pool / ("0" * 52)).write_bytes(b"small")
        await self.collect()
        self.assertEqual(self.freed, 8191 + 4 * 8192 + 5)
        self.assertEqual(len(list(pool.iterdir())), 1)

    def file(self, data: bytes) -> str:
        path = Path(self.directory, "file")
        path.write_bytes(data)
        path.chmod(0o644)
        return str(path)


class RefusalTests(CollectingCase):
    tcp = True

    async def test_by_tcp(self) -> None:
        """G22, P19: refused before the arguments are read."""
        error = await self.refused(b"\x14" + bytes(7), endpoint=self.port)
        self.assertIn("TCP", error.text)


class MeanwhileTests(CollectingCase):
    """G19: others go on during a collection, and lose nothing."""

    async def _add(self, name: str, count: int) -> list[StorePath]:
        """Add and look, and let go of it by leaving now and then."""
        kept: list[StorePath] = []
        client = await self.client()
        for number in range(count):
            path = await client.add_text(f"{name}-{number}", b"%d" % number, kept[-1:])
            self.assertTrue(await client.is_valid_path(path), path)
            info = await client.path_info(path)
            self.assertEqual(list(info.references), kept[-1:])
            kept.append(path)
            self.held.append(client)
        return kept

    async def test_adding(self) -> None:
        self.held: list[Client] = []
        dead = [f"dead-{number}" for number in range(300)]
        await self.texts(*dead)
        rounds = 6

        async def collecting() -> int:
            found = 0
            for _ in range(rounds):
                found += len(await self.collect())
            return found

        def begin(work: Any) -> Deferred[Any]:
            return Deferred.fromCoroutine(work)

        found, *added = await gatherResults(
            [begin(collecting()), *(begin(self._add(f"new-{who}", 60)) for who in range(4))]
        )
        self.assertEqual(found, len(dead))
        client = await self.client()
        for paths in added:
            self.assertEqual(list(await client.valid_paths(paths)), sorted(paths))
            self.assertEqual(self.there(*paths), [True] * len(paths))

    async def test_touched(self) -> None:
        """A dead item that somebody begins to use in the middle stays, with what it needs."""
        paths = await self.texts(*(f"t{number}" for number in range(400)))
        collector = await self.client()
        other = await self.client()
        collecting = collector.collect_garbage(DELETE_DEAD)
        await other.add_temp_root(paths[20])
        if not await other.is_valid_path(paths[20]):
            raise AssertionError("the collection was quicker than this test can be")
        gone = set((await collecting).paths)
        self.assertEqual(gone, set(paths[21:]))
        self.assertEqual(list(await other.valid_paths(paths)), sorted(paths[:21]))

    async def test_new_root(self) -> None:
        """A root that is made in the middle counts when SyncWithGC has returned."""
        paths = await self.texts(*(f"t{number}" for number in range(400)))
        collector = await self.client()
        other = await self.client()
        collecting = collector.collect_garbage(DELETE_DEAD)
        self.root(paths[20])
        await other.sync_with_gc()
        valid = await other.is_valid_path(paths[20])
        await collecting
        self.assertEqual(await other.is_valid_path(paths[20]), valid)
        self.assertTrue(valid)

    async def test_leaving(self) -> None:
        """A client that leaves in the middle leaves a store in which all is right."""
        paths = await self.texts(*(f"t{number}" for number in range(2000)))
        collector = await self.client()
        collecting = collector.collect_garbage(DELETE_DEAD)
        collecting.addErrback(lambda _: None)
        other = await self.client()
        while await other.is_valid_path(paths[-1]):
            pass
        collecting.cancel()
        store = self.daemon.service.daemon.open_store(True)
        while store.collecting.locked:
            await other.is_valid_path(paths[0])
        valid = list(await other.valid_paths(paths))
        self.assertEqual(valid, sorted(paths[: len(valid)]))
        self.assertEqual(self.there(*valid), [True] * len(valid))
        await self.collect()
        self.assertEqual(os.listdir(self.store.path), [".links"])
