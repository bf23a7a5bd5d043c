"""Work in threads that would take hours: it holds nobody up, and ends with who wants it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredQueue

from guixd.build import contents, draft, leftovers, outputs
from guixd.formats import operations as op
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from guixd.service.parts import WORKER_THREADS
from guixd.store import collector, recovery
from guixd.store.items import Registration
from guixd.store.local import LocalStore
from guixd.store.trees import hash_nar
from guixd.store.verify import Verification
from tests.net.servers import Server, always
from tests.security.test_builds import BuildCase
from tests.service.downloads import CONTENT, DownloadCase
from tests.service.test_real_builds import PlayedCase
from tests.service.world import set_options

HOURS = 2 << 40
"""Bytes that nobody can read in the time of a test; as a file of zeros they take no disk."""


class Watched:
    """Tells when a function that threads call begins and ends.

    :param function: what is called.
    :param of: the arguments that matter.
    """

    def __init__(self, function: Callable[..., Any], of: Callable[..., bool]) -> None:
        self._function = function
        self._of = of
        self.begun: DeferredQueue[None] = DeferredQueue()
        self.ended: DeferredQueue[None] = DeferredQueue()

    def __call__(self, *args: Any, **named: Any) -> Any:
        if not self._of(*args):
            return self._function(*args, **named)
        reactor.callFromThread(self.begun.put, None)
        try:
            return self._function(*args, **named)
        finally:
            reactor.callFromThread(self.ended.put, None)


class OutputTests(BuildCase):
    users = WORKER_THREADS + 1

    def make(self, **options: Any) -> Any:
        return super().make(max_jobs=self.users, **options)

    async def test_sparse(self) -> None:
        """X34: large outputs keep no other work waiting, and end with their clients."""
        watched = Watched(outputs.hash_and_scan, lambda fd, name, *_: "sparse" in name)
        self.patch(outputs, "hash_and_scan", watched)
        client = await self.client()
        raws = []
        for number in range(WORKER_THREADS):
            script = f"$b truncate -s {HOURS} $out"
            drv, _ = await self.prepare(client, f"sparse-{number}", script)
            raws.append(await self.raw(None, set_options(), op.BuildPaths((drv,))))
        for _ in raws:
            await watched.begun.get()
        # Both of what follows needs threads.
        drv, out = await self.prepare(client, "other", "$b mkdir $out")
        await client.build_paths([drv])
        self.assertTrue(os.path.isdir(out))
        await client.add_nar("large", [nar_of_file(b"x" * 100_000)])
        raws[0].transport.loseConnection()
        await watched.ended.get()
        await self.nothing_left()


class DownloadTests(DownloadCase):
    async def test_leaving(self) -> None:
        """X34, W21: reading a downloaded file once more ends with the client."""

        def enlarge_and_hash(directory: int, name: str, *rest: Any) -> object:
            file = os.open(name, os.O_WRONLY, dir_fd=directory)
            os.truncate(file, HOURS)
            os.close(file)
            return hash_nar(directory, name, *rest)

        reading = Watched(enlarge_and_hash, lambda *_: True)
        self.patch(draft, "hash_nar", reading)
        # Without a length, so that the archive's head is not known in time.
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(CONTENT), CONTENT)
        server = Server(self, always(head + body))
        client = await self.client()
        drv, _ = await self.derive(client, f'"{server.url()}"', executable=True)
        client.build_paths([drv]).addErrback(lambda _: None)
        await reading.begun.get()
        await client.close()
        await reading.ended.get()
        await self.daemon.stop()
        self.assertEqual(os.listdir(self.directory + "/tmp"), [])

    async def test_stop_while_tidying(self) -> None:
        """X34: a daemon that removes what a dead one has left can be stopped."""
        tree = Path(self.directory, "tmp/guix-build-x.drv-0")
        tree.joinpath("top").mkdir(parents=True)
        tree.chmod(leftovers.RUNNING)

        def slow(_fd: None, _name: str, *, check: Callable[[], object]) -> None:
            while True:
                check()
                os.sched_yield()

        removal = Watched(slow, lambda *_: True)
        self.patch(leftovers, "remove", removal)
        await self.raw(None, set_options(), op.BuildPaths((self.path("x.drv"),)))
        await removal.begun.get()
        await self.daemon.stop()
        self.assertTrue(tree.joinpath("top").exists())


class ItemTests(PlayedCase):
    """With a valid item that takes hours to read."""

    @property
    def local(self) -> LocalStore:
        store = self.daemon.service.daemon._store
        assert store is not None
        return store

    async def item(self) -> StorePath:
        await self.client()
        path = self.path("sparse")
        Path(path).touch()
        os.truncate(path, HOURS)
        os.chmod(path, 0o444)
        self.local.register([Registration(path, bytes(32), HOURS, frozenset(), None)])
        return path

    async def test_verifying(self) -> None:
        """S21: however many clients verify, there are threads for others, and all can stop."""
        path = await self.item()
        read = Watched(Verification._measure, lambda work, fd, name: name == path.base)
        self.patch(Verification, "_measure", lambda *args: read(*args))
        request = op.VerifyStore(True, False)
        raws = [await self.raw(None, set_options(), request) for _ in range(WORKER_THREADS)]
        await read.begun.get()
        await read.begun.get()
        client = await self.client()
        await client.add_nar("large", [nar_of_file(b"x" * 100_000)])
        raws[0].transport.loseConnection()
        await read.begun.get()  # it is another client's turn
        await self.daemon.stop()

    async def test_leaving_repair(self) -> None:
        """B35: reading an item that may be damaged ends with the client."""
        path = await self.item()
        read = Watched(contents.hash_and_scan, lambda fd, name: name == path)
        self.patch(contents, "hash_and_scan", read)
        raw = await self.raw(None, set_options(), op.BuildPaths((path,), mode=1))
        await read.begun.get()
        raw.transport.loseConnection()
        await read.ended.get()

    async def test_leaving_collection(self) -> None:
        """G19: a client that leaves does not wait for the trash, which is for the next."""
        client = await self.client()
        tree = os.path.join(self.directory, "tree")
        os.mkdir(tree)
        path = await client.add_tree("tree", tree)
        await client.close()
        remove = collector.remove
        hanging = True

        def slow(*args: Any, check: Callable[[], object], **named: Any) -> int:
            while hanging and args[1] != collector.TRASH:
                check()
                os.sched_yield()
            return remove(*args, check=check, **named)

        removal = Watched(slow, lambda fd, name: name != collector.TRASH)
        self.patch(collector, "remove", removal)
        request = op.CollectGarbage(2, (), False, 1 << 62)
        raw = await self.raw(None, set_options(), request)
        await removal.begun.get()
        raw.transport.loseConnection()
        await removal.ended.get()
        hanging = False
        client = await self.client()
        await client.collect_garbage(2)
        self.assertFalse(os.path.lexists(path))
        self.assertNotIn(collector.TRASH, os.listdir(self.store.path))

    async def test_stop_in_recovery(self) -> None:
        """S16: a daemon that looks at what the machine may have lost can be stopped."""
        begun: Deferred[None] = Deferred()

        def slow(_store: LocalStore, reading: Verification) -> list[StorePath]:
            reactor.callFromThread(begun.callback, None)
            while not reading._stopped:
                os.sched_yield()
            return []

        self.patch(recovery, "is_needed", lambda store: True)
        self.patch(recovery, "find_damaged", slow)
        self.patch(recovery, "drop_damaged", lambda *_: self.fail("not all was looked at"))
        await self.raw()
        await begun
        await self.daemon.stop()
