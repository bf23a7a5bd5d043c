"""Clients that do not read what they asked for."""

from __future__ import annotations

from guixd.formats import operations as op
from tests.archives import File, archive
from tests.load.crowd import CrowdCase

ITEMS = 20_000
STOPPED = 8
QUESTIONS = 40
"""How often each of them asks for all items."""
EXPORTED = 32 << 20
"""Bytes of an item."""
ROOM = 16 << 20
"""Bytes that the daemon may take for its own work at one such reply."""


class SlowTests(CrowdCase):
    def test_long_replies(self) -> None:
        """Who reads nothing has one reply in memory, whatever it asked for; others are served."""
        paths = self.fill(ITEMS)
        request = op.QueryAllValidPaths()
        polite = self.client()
        self.assertEqual(len(polite.ask(request)), ITEMS)
        size = len(paths[0]) * ITEMS * 3 // 2
        before = self.memory()
        stopped = [self.client() for _ in range(STOPPED)]
        for client in stopped:
            client.socket.sendall(request.encode() * QUESTIONS)
        for path in paths[:500]:
            self.assertTrue(polite.ask(op.IsValidPath(path)))
        self.assertEqual(len(polite.ask(request)), ITEMS)
        self.assertLess(self.memory() - before, size * STOPPED + ROOM)
        for _ in range(QUESTIONS):
            self.assertEqual(len(stopped[0].reply(request)), ITEMS)
        for client in stopped:
            client.close()
        self.assertEqual(self.program.end()[0], 0)

    def test_exports(self) -> None:
        """Who does not read what it exports has little of it in memory; others are served."""
        polite = self.client()
        request = op.AddToStore("large", True, True, "sha256")
        polite.socket.sendall(request.encode() + archive(File(bytes(EXPORTED))))
        path = polite.reply(request)
        before = self.memory()
        stopped = [self.client() for _ in range(STOPPED)]
        for client in stopped:
            client.socket.sendall(op.ExportPath(path, False).encode())
        for client in stopped:
            self.assertGreater(len(client.socket.recv(1000)), 0)
        for _ in range(500):
            self.assertTrue(polite.ask(op.IsValidPath(path)))
        self.assertLess(self.memory() - before, EXPORTED * STOPPED // 4)
        for client in stopped:
            client.close()
        again = self.client()
        again.ask(op.ExportPath(path, False))

    def test_endless_questions(self) -> None:
        """Who asks all the time and reads nothing is read no more."""
        (path,) = self.fill(1)
        request = op.QueryPathInfo(path)
        stopped, polite = self.client(), self.client()
        before = self.memory()
        stopped.socket.setblocking(False)
        refused = 0
        while refused < 50:
            try:
                stopped.socket.send(request.encode() * 20)
                refused = 0
            except BlockingIOError:
                refused += 1
            polite.ask(request)
        self.assertLess(self.memory() - before, 2 << 20)
