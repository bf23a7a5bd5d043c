"""Many clients at once and one after the other: memory, descriptors, and turns."""

from __future__ import annotations

from guixd.formats import operations as op
from guixd.formats.messages import Greeting
from tests.load.crowd import CrowdCase
from tests.load.peer import Ended

IDLE = 1000
BUSY = 64
MOST_IDLE = 60 << 10
"""Bytes that an idle client may cost."""


class CrowdTests(CrowdCase):
    def test_idle(self) -> None:
        """A thousand idle clients cost little each, and nothing when they have left."""
        first = self.client()
        files, before = self.descriptors(), self.memory()
        idle = [self.client() for _ in range(IDLE)]
        each = (self.memory() - before) / IDLE
        self.assertLess(each, MOST_IDLE)
        for number, peer in enumerate(idle):
            if number % 100 == 0:
                self.assertFalse(peer.ask(op.IsValidPath(self.store.child("0" * 32 + "-a"))))
            peer.close()
        while self.descriptors() > files:  # each question lets the daemon have a turn
            first.ask(op.QueryFailedPaths())
        self.assertEqual(self.program.end()[0], 0)

    def test_come_and_go(self) -> None:
        """Clients that come and go, in all ways, leave nothing behind."""
        last = self.client()
        sizes = []
        for _ in range(4):
            for _ in range(150):
                self.client().close()
                self.peer().close()
                cut = self.peer()
                cut.socket.sendall(Greeting().encode()[:20])
                cut.close()
                wrong = self.peer()
                wrong.socket.sendall(b"GET / HTTP/1.0\r\n\r\n")
                self.assertRaises(Ended, wrong.expect_last)
                rooted = self.client()
                rooted.ask(op.AddTempRoot(self.store.child("0" * 32 + "-a")))
                rooted.socket.sendall(op.AddToStore("a", True, True, "sha256").encode() + b"half")
                rooted.close()
            last.ask(op.QueryFailedPaths())
            sizes.append((self.memory(), self.descriptors()))
        self.assertLess(sizes[-1][0] - sizes[1][0], 1 << 20)
        self.assertLess(sizes[-1][1] - sizes[1][1], 8)

    def test_busy(self) -> None:
        """Many clients at work all get what they asked for."""
        busy = [self.client() for _ in range(BUSY)]
        for turn in range(20):
            texts = {peer: f"{turn} {number}".encode() for number, peer in enumerate(busy)}
            requests = {peer: op.AddTextToStore("text", text, ()) for peer, text in texts.items()}
            for peer, request in requests.items():
                peer.socket.sendall(request.encode())
            paths = {peer: peer.reply(request) for peer, request in requests.items()}
            self.assertEqual(len(set(paths.values())), BUSY)
            for peer in busy:
                peer.socket.sendall(op.QueryPathInfo(paths[peer]).encode())
            for peer in busy:
                info = peer.reply(op.QueryPathInfo(paths[peer]))
                self.assertEqual(info.references, ())
