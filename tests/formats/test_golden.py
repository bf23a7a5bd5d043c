"""Recorded bytes of the stock client and daemon, see `tests/golden/record.py`."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from guixd.formats import messages as m
from guixd.formats import operations as op
from guixd.formats import trace
from guixd.formats.nar import NarParser
from guixd.formats.operations import Requests, encode_reply, reply_kind
from guixd.formats.wire import MORE, Source
from tests.formats.test_messages import encode
from tests.golden.record import NAMES, load

HELLO = "/gnu/store/bjfjcd0iwaqp6ckwlrd6qim7hjaa5ngi-hello.txt"


class _Ignored:
    """Takes the contents of an archive in and forgets them."""

    def directory(self, name: bytes) -> None: ...
    def end_directory(self) -> None: ...
    def file(self, name: bytes, executable: bool, size: int) -> None: ...
    def data(self, view: memoryview) -> None: ...
    def end_file(self) -> None: ...
    def symlink(self, name: bytes, target: bytes) -> None: ...


def read_client(data: bytes) -> tuple[m.Greeting, list[tuple[op.Operation[Any], bytes]]]:
    """Return the greeting and the requests, each with the archive that follows it."""
    source = Source()
    source.feed(data)
    greeting = m.ServerHandshake().resume(source)
    assert greeting is not MORE
    decoder = Requests(source, greeting.minor)
    found = []
    while (request := decoder.next()) is not None:
        archive = b""
        if isinstance(request, op.AddToStore):
            rest = source.rest()
            used = NarParser(_Ignored()).feed(rest)
            archive = rest[:used]
            source.feed(rest[used:])
        found.append((request, archive))
    assert not len(source)
    return greeting, found


def read_daemon(
    data: bytes, requests: list[op.Operation[Any]]
) -> list[tuple[list[m.Message], Any]]:
    """Return what the daemon said to the greeting (first) and to each request."""
    source = Source()
    source.feed(data)
    assert m.ClientHandshake().resume(source) == 0x164
    reader = m.MessageReader()
    found = []
    for request in [None, *requests]:
        said = []
        reply = None
        while not said or not isinstance(said[-1], m.Last | m.Failed):
            message = reader.resume(source)
            assert message is not MORE
            said.append(message)
        if request is not None and isinstance(said[-1], m.Last):
            reply = reply_kind(request.opcode).begin().resume(source)
            assert reply is not MORE
        found.append((said, reply))
    assert not len(source)
    return found


def conversation(name: str) -> list[tuple[op.Operation[Any], list[m.Message], Any]]:
    """Return the requests of a recording with the messages and replies to them."""
    sides = {">": b"", "<": b""}
    for side, data in load(name):
        sides[side] += data
    _, requests = read_client(sides[">"])
    answers = read_daemon(sides["<"], [request for request, _ in requests])
    return [
        (request, said, reply)
        for (request, _), (said, reply) in zip(requests, answers[1:], strict=True)
    ]


class Golden(SynchronousTestCase):
    """Our encoders give the bytes that our decoders read."""

    def test_client(self) -> None:
        """P1: all requests, decoded and encoded again, are what the stock client sent."""
        for name in NAMES:
            data = b"".join(part for side, part in load(name) if side == ">")
            greeting, requests = read_client(data)
            again = greeting.encode() + b"".join(
                request.encode() + archive for request, archive in requests
            )
            self.assertEqual(again, data, name)

    def test_daemon(self) -> None:
        """P1: all answers, decoded and encoded again, are what the stock daemon sent."""
        for name in NAMES:
            data = b"".join(part for side, part in load(name) if side == "<")
            again = m.ANSWER + m.LAST
            for request, said, reply in conversation(name):
                again += b"".join(map(encode, said))
                if isinstance(said[-1], m.Last):
                    again += encode_reply(request, reply)
            self.assertEqual(again, data, name)

    def test_values(self) -> None:
        """P7: what was said means what we think."""
        said = conversation("is-valid")
        self.assertEqual([request.path for request, _, _ in said][::2], [HELLO, "/tmp/hello.txt"])
        self.assertEqual([reply for _, _, reply in said], [True, False, None, True])
        self.assertEqual(said[2][1], [m.Failed("path `/tmp/hello.txt' is not in the store", 1)])
        added = conversation("add-text")
        self.assertEqual(
            added[0], (op.AddTextToStore("hello.txt", b"Hello, store!\n", ()), [m.Last()], HELLO)
        )
        flat = conversation("add-flat")
        self.assertEqual(
            [request for request, _, _ in flat],
            [
                op.AddToStore("flat", True, False, "sha256"),
                op.AddToStore("flat", True, False, "sha1"),
            ],
        )
        info = conversation("queries")[0][2]
        self.assertEqual((info.deriver, info.references, info.nar_size), (None, (), 128))
        options = conversation("set-options")[0][0]
        self.assertEqual(options.verbosity, 2)
        self.assertIs(options.use_substitutes, False)
        self.assertIn(("build-max-jobs", "3"), options.pairs)
        live, dead = conversation("collect")
        self.assertEqual((live[0].action, live[0].max_freed), (0, 2**64 - 1))
        self.assertIn(HELLO, dead[2].paths)

    def test_traces(self) -> None:
        """P24, P25: the log of a build that works and of one that fails."""
        logs = {}
        for name in ("build-works", "build-fails"):
            request, said, _ = conversation(name)[-1]
            self.assertIsInstance(request, op.BuildPaths)
            logs[name] = said
        works, fails = logs["build-works"], logs["build-fails"]
        started = trace.parse(works[0].text.decode()[:-1])
        assert isinstance(started, trace.BuildStarted)
        self.assertEqual(started.line.encode() + b"\n", works[0].text)
        self.assertEqual(works[1].text, trace.build_log(started.pid, b"building\n"))
        self.assertEqual(
            works[2].text.decode(), trace.BuildSucceeded(started.derivation).line + "\n"
        )
        self.assertEqual(works[3:], [m.Last()])
        failed = trace.parse(fails[-2].text.decode()[:-1])
        assert isinstance(failed, trace.BuildFailed)
        self.assertEqual(failed.line.encode() + b"\n", fails[-2].text)
        self.assertEqual(fails[-3].text.decode(), failed.text + "\n")
        self.assertEqual(fails[-1], m.Failed(f"build of `{failed.derivation}' failed", 100))
