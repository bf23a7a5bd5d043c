"""A hundred thousand connections to one daemon, which takes minutes; not part of the suite.

    python -m pytest -s tests/load/soak.py

The suite has the same in small in `test_crowd.py`.
"""

from __future__ import annotations

import time

from guixd.formats import operations as op
from guixd.formats.messages import Greeting
from tests.load.crowd import CrowdCase
from tests.load.peer import Peer

CONNECTIONS = 100_000
REPORTS = 10
IDLE = 1000
BUSY = 64


class SoakTests(CrowdCase):
    def test_soak(self) -> None:
        """Neither memory nor descriptors grow, with many idle and busy clients all the time."""
        paths = self.fill(1000)
        first, files = self.memory(), self.descriptors()
        idle = [self.client() for _ in range(IDLE)]
        print(f"\n{first >> 10} KiB; an idle client: {(self.memory() - first) / IDLE:.0f} bytes")
        busy = [self.client() for _ in range(BUSY)]
        sizes = []
        for report in range(REPORTS):
            begin = time.monotonic()
            for number in range(CONNECTIONS // REPORTS):
                peer = Peer(self.program.socket, self.store)
                if number % 10 == 0:
                    peer.socket.sendall(Greeting().encode()[: number % 24])
                else:
                    peer.greet()
                    peer.ask(op.IsValidPath(paths[number % len(paths)]))
                    if number % 10 == 1:
                        peer.ask(op.AddTempRoot(paths[0]))
                    if number % 10 == 2:
                        peer.socket.sendall(op.AddToStore("a", True, True, "sha256").encode())
                peer.close()
                asking = busy[number % BUSY]
                asking.ask(op.QueryPathInfo(paths[number % len(paths)]))
            sizes.append((self.memory(), self.descriptors()))
            seconds = time.monotonic() - begin
            print(
                f"{(report + 1) * CONNECTIONS // REPORTS} connections:"
                f" {sizes[-1][0] >> 10} KiB, {sizes[-1][1]} descriptors;"
                f" {seconds / CONNECTIONS * REPORTS * 1e6:.0f} us each"
            )
        for peer in (*idle, *busy):
            peer.close()
        self.client()
        self.assertLess(sizes[-1][0] - sizes[1][0], 2 << 20)
        self.assertLess(sizes[-1][1] - sizes[1][1], 8)
        self.assertLess(self.descriptors(), files + 8)
