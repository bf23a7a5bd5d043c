"""B29: builders that write very much, or anything."""

from __future__ import annotations

import gzip
import hashlib
import random
from collections.abc import Callable, Sequence

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.utils import getProcessValue
from twisted.trial.unittest import TestCase

from guixd.build.broadcast import BLOCK, TAIL, WINDOW
from guixd.build.launcher import CHUNK
from guixd.build.logs import QUEUE_LIMIT, log_file
from guixd.formats.path import StorePath
from tests.build.graph import World, reactor
from tests.support import requires_root

MIB = 1 << 20
PIPE = 1 << 20
"""The most that a pipe takes, in bytes."""


class Digest:
    """An observer that keeps the hash of what it gets; it takes nothing while it is `blocked`."""

    def __init__(self, blocked: Deferred[None] | None = None) -> None:
        self.blocked = blocked
        self.size = 0
        self.got: Callable[[int], None] = lambda size: None
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def log(self, level: int, text: str) -> None:
        pass

    def trace(self, line: str, instead: str = "") -> None:
        pass

    def output(self, pid: int, chunk: bytes) -> None:
        self.size += len(chunk)
        self._hash.update(chunk)
        self.got(len(chunk))

    def last_words(self, lines: Sequence[str], file: str) -> None:
        pass

    def full(self) -> Deferred[None] | None:
        if self.blocked is None:
            return None
        waiter: Deferred[None] = Deferred()
        self.blocked.addCallback(lambda _: waiter.callback(None))
        return waiter


@requires_root
class FloodTests(TestCase):
    """Everything arrives everywhere, in bounded memory."""

    timeout = 60

    def in_log(self, world: World, drv: StorePath) -> str:
        """Return the hash of what the log file of DRV has."""
        path = log_file(world.settings.directories.log, drv, "gzip")
        digest = hashlib.sha256()
        with gzip.open(path) as file:
            while block := file.read(MIB):
                digest.update(block)
        return digest.hexdigest()

    async def test_much(self) -> None:
        """B29: 200 MiB, and what cannot be compressed, without newlines and of any bytes."""
        random_bytes = random.Random(1).randbytes(MIB).replace(b"\n", b"\0\xff")
        text = (b"\xfe checking whether the compiler works... yes\x01" * 22_000)[:MIB]
        world = World(self)
        for name, data, times in ("much", text, 200), ("random", random_bytes, 12):
            with self.subTest(name):
                await self.much(world, name, data, times)

    async def much(self, world: World, name: str, data: bytes, times: int) -> None:
        """Let a builder write DATA so often, which must be kept and passed on in bounded memory."""
        file = world.file(name, data)
        drv = world.derive(name, f"cat {' '.join([file] * times)}; echo > $out", sources=[file])
        client, kept = Digest(), list[int]()
        building = world.build(drv, observer=client)  # type: ignore[arg-type]
        broadcast = world.engine._builds[drv]._broadcast

        def look(size: int) -> None:
            assert broadcast.log_file is not None
            kept.append(len(broadcast._tail) + broadcast.log_file._queued)

        client.got = look
        await building
        expected = hashlib.sha256(data * times)
        self.assertEqual(client.size, len(data) * times)
        self.assertEqual(client.digest, expected.hexdigest())
        self.assertEqual(self.in_log(world, drv), expected.hexdigest())
        self.assertLessEqual(max(kept), 2 * TAIL + QUEUE_LIMIT + 2 * CHUNK)

    async def test_client_that_does_not_read(self) -> None:
        """B29: the builder waits for its only client, and then nothing is missing."""
        world, size = World(self), 8 * MIB
        blocked: Deferred[None] = Deferred()
        client = Digest(blocked)
        script = f"head -c {size} /dev/zero | tr '\\0' x; echo > $out"
        drv = world.derive("flood", script)
        building = world.build(drv, observer=client, max_silent_time=1)  # type: ignore[arg-type]
        broadcast = world.engine._builds[drv]._broadcast
        while not broadcast._holding:
            await deferLater(reactor, 0.01)
        # Longer than the builder may be silent: what it is kept from writing is no silence.
        await deferLater(reactor, 1.2)
        self.assertFalse(building.called)
        self.assertLessEqual(broadcast._end, WINDOW + 2 * CHUNK + PIPE)
        self.assertLessEqual(len(broadcast._tail), 2 * TAIL + BLOCK)
        client.blocked = None
        blocked.callback(None)
        await building
        expected = hashlib.sha256(b"x" * size).hexdigest()
        self.assertEqual((client.size, client.digest), (size, expected))
        self.assertEqual(self.in_log(world, drv), expected)

    async def test_live(self) -> None:
        """B29: with every compression, what a builder wrote can be read soon, and is no torso."""
        readers = {"gzip": "zcat", "bzip2": "bzcat", "none": "cat"}
        # One after the other: each has a pool of its own, of the same build users.
        for compression, reader in readers.items():
            world = World(self, log_compression=compression)
            drv = world.derive("live", "echo early; sleep 1000")
            building = world.build(drv)
            path = log_file(world.settings.directories.log, drv, compression)
            script = f'until {reader} "$1" 2>/dev/null | grep -qx early; do sleep 0.1; done'
            self.assertEqual(await getProcessValue("/bin/sh", ["-c", script, "sh", path]), 0)
            building.addErrback(lambda _: None)
            building.cancel()
            await building
