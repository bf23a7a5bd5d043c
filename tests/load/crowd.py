"""A daemon in a process of its own, with a crowd of clients."""

from __future__ import annotations

import os
import sqlite3

from twisted.trial.unittest import SynchronousTestCase

from guixd.formats import operations as op
from guixd.formats.path import StoreDirectory, StorePath
from tests.load.peer import Peer, allow_descriptors, descriptors, memory
from tests.service.program import PROGRAM, Program
from tests.service.world import set_options
from tests.support import require


class CrowdCase(SynchronousTestCase):
    """A test with a daemon and many connections to it."""

    options: tuple[str, ...] = ()

    def setUp(self) -> None:
        require(allow_descriptors(4096), "4096 open files")
        self.program = Program(self, [*PROGRAM, *self.options])
        self.assertEqual(self.program.state(), b"READY=1")
        self.store = StoreDirectory(self.program.directory + "/store")
        self.pid = self.program.process.pid

    def peer(self) -> Peer:
        """Return a client that is connected, no more."""
        peer = Peer(self.program.socket, self.store)
        self.addCleanup(peer.close)
        return peer

    def client(self) -> Peer:
        """Return a client that has told its options and asked something."""
        peer = self.peer()
        peer.greet()
        peer.ask(set_options())
        peer.ask(op.QueryFailedPaths())
        return peer

    def memory(self) -> int:
        """Return how many bytes the daemon uses."""
        return memory(self.pid)

    def descriptors(self) -> int:
        """Return how many descriptors the daemon has."""
        return descriptors(self.pid)

    def fill(self, count: int) -> list[StorePath]:
        """Make COUNT paths valid without files."""
        self.client().close()
        paths = [self.store.child(f"{number:032}-item") for number in range(count)]
        file = os.path.join(self.program.directory, "var/db/db.sqlite")
        with sqlite3.connect(file) as database:
            database.executemany(
                "INSERT INTO ValidPaths (path, hash, registrationTime, narSize)"
                " VALUES (?, ?, 1, 1)",
                [(str(path), "sha256:" + "0" * 64) for path in paths],
            )
        database.close()
        return paths
