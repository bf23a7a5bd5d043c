"""Limits of connections and of silence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from guixd.formats import operations as op
from guixd.formats.messages import Greeting
from tests.crash.site import STRANGER
from tests.load.crowd import CrowdCase
from tests.load.peer import Ended, Peer
from tests.service.program import PROGRAM, Program
from tests.support import is_root, require


class MostTests(CrowdCase):
    options = ("--max-connections-per-user=3",)

    def stranger(self) -> Peer:
        """Return a client of a user who is not the daemon's."""
        require(is_root(), "root")
        os.seteuid(STRANGER)
        try:
            return self.peer()
        finally:
            os.seteuid(0)

    def test_most(self) -> None:
        """Who has too many connections is told so, others are not affected."""
        peers = [self.stranger() for _ in range(3)]
        for peer in peers:
            peer.greet()
        more = [self.stranger() for _ in range(3)]
        self.assertRaisesRegex(AssertionError, "user 61998 has 3 connections", more[0].greet)
        more[1].socket.sendall(Greeting().encode())
        # Who does not even greet is not waited for when there are twice as many.
        last = self.stranger()
        self.assertRaises(Ended, last.expect_last)
        for _ in range(5):
            self.client()
        peers[0].ask(op.QueryFailedPaths())
        for peer in (*more, *peers):
            peer.close()
        self.client()
        self.stranger().greet()


class SilenceTests(CrowdCase):
    options = ("--greeting-timeout=1", "--idle-timeout=1")

    def test_silence(self) -> None:
        """Who does not greet, or asks for nothing for long, is disconnected."""
        silent, slow, idle = self.peer(), self.peer(), self.client()
        slow.socket.sendall(Greeting().encode()[:12])
        asked = self.client()
        for peer in (silent, slow, idle):
            peer.socket.setblocking(False)
        waiting = {silent, slow, idle}
        while waiting:
            asked.ask(op.QueryFailedPaths())
            for peer in list(waiting):
                try:
                    if not peer.socket.recv(1000):
                        waiting.remove(peer)
                except BlockingIOError:
                    pass
        asked.ask(op.QueryFailedPaths())


_HELPER = """
import socket
from guixd import descriptors
from guixd.net.spawning import start_helper
descriptors.allow_many()
boot = "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
with socket.socket() as end:
    start_helper(boot, end, {}).wait()
"""


class DescriptorTests(CrowdCase):
    def test_daemon(self) -> None:
        """The daemon uses all descriptors that it may."""
        program = Program(self, ["prlimit", "--nofile=300:3000", *PROGRAM])
        program.state()
        limits = Path(f"/proc/{program.process.pid}/limits").read_text()
        self.assertRegex(limits, re.compile(r"^Max open files +3000 +3000 ", re.M))

    def test_helpers(self) -> None:
        """Its helpers, and so builders, have what it was given."""
        command = ["prlimit", "--nofile=300:3000", sys.executable, "-c", _HELPER]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout, "300 3000\n")
