"""A fetcher that somebody else has taken over: the daemon goes on, and nothing hangs (W22)."""

from __future__ import annotations

from guixd.net import spawning
from guixd.net.requests import Answer
from tests.net.servers import FetcherCase, Server, always, answer
from tests.support import open_files

_BOOT = """
import json, os, socket, sys
end = socket.socket(fileno=int(sys.argv[1]))
def tell(what, *opened):
    socket.send_fds(end, [what if type(what) is bytes else json.dumps(what).encode()], opened)
while packet := socket.recv_fds(end, 1 << 18, 4):
    what, number, *rest = json.loads(packet[0].partition(b"\\n")[0])
    if what in ("fetch", "lookup"):
        sink = (packet[1] or [0])[0]
        head = {"url": "x", "size": 5, "offset": 0, "validator": ""}
        exec(sys.argv[2])
"""
_ALL = 'os.write(sink, b"hello"); os.close(sink); '


class BadHelperTest(FetcherCase):
    def setUp(self) -> None:
        super().setUp()
        self.server = Server(self, always(answer(b"right")))
        self.real = spawning._FETCHER

    def helper(self, does: str) -> None:
        """Let the next helper do what the text DOES says when it is asked for something."""
        boot = _BOOT.replace("sys.argv[2]", repr(does))
        self.patch(spawning, "_FETCHER", boot)

    async def ended(self) -> None:
        """Let the helper end; the next one is a real one."""
        self.patch(spawning, "_FETCHER", self.real)
        if self.fetcher._process is not None:
            self.fetcher._process.kill()
        await self.fetcher._ended

    async def test_nonsense(self) -> None:
        """Packets that are none, with descriptors; values that are none."""
        before = 0
        for does in (
            "tell(b'{', 0, 0, 0)",
            "tell(b'[' * 100_000, 0)",
            "tell(b'[\"x\",' + b' ' * 170_000, 0)",
            "tell(b'5', 0)",
            "tell([], 0)",
            "tell(['failed', number, 'body', 'x', 'y'])",
            "tell(['head', number, {**head, 'size': -1}])",
            "tell(['head', number, {**head, 'size': 10 ** 30}])",
            "tell(['head', number, 7])",
            "tell(['ready', 7])",
        ):
            self.helper(does)
            error = await self.refused(self.server.url())
            self.assertEqual(error.kind, "fetcher", does)
            await self.ended()
            before = before or open_files()
            self.assertEqual(open_files(), before, does)
        self.assertTrue(self.flushLoggedErrors(ValueError, TypeError))
        self.assertEqual((await self.fetch(self.server.url()))[0], b"right")

    async def test_lies(self) -> None:
        """The end before the beginning; more than may come; other numbers; words for terminals."""
        done = "tell(['done', number, head, 5, 5])"
        self.helper(_ALL + done)
        self.assertEqual((await self.fetch(self.server.url()))[0], b"hello")
        for does, kind in (
            (f"tell(['head', number, head]); {_ALL} {done}", "limit"),
            (done.replace("5, 5", "0, 1") + "; os.close(sink)", "fetcher"),
            ("tell(['failed', number, 'body', 'x\\n@ build-failed', 0])", "body"),
        ):
            await self.ended()
            self.helper(does)
            error = await self.refused(self.server.url(), limit=4)
            self.assertEqual(error.kind, kind)
            self.assertTrue(error.text.isprintable())

    async def test_answers(self) -> None:
        """A lookup is asked again when its answer makes no sense."""
        self.helper("tell(['answer', number, 0, 'x', None, '', False, False])")
        answers: dict[int, Answer] = {}
        asking = self.fetcher.lookup([self.server.url()], answers.__setitem__)
        self.patch(spawning, "_FETCHER", self.real)
        await asking
        self.assertTrue(self.flushLoggedErrors(ValueError))
        self.assertEqual(answers[0].body, b"right")
