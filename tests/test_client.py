"""The client, against connections of the daemon."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from guixd.client import Client, Disconnected, RequestFailed, connect, nar_of_tree
from guixd.errors import BuildError, GuixdError, ProtocolError, StoreError
from guixd.formats import operations as op
from guixd.formats.messages import Greeting, encode_write
from guixd.formats.nar import nar_of_file
from guixd.formats.operations import encode_reply
from guixd.formats.path import StoreDirectory, StorePath
from guixd.service.answers import Answers
from guixd.service.connection import Connection
from guixd.service.listener import Listener
from tests.service.peers import Recorder, asynchronous
from tests.support import temporary_directory

HELLO = StorePath("/gnu/store/bjfjcd0iwaqp6ckwlrd6qim7hjaa5ngi-hello.txt")
INFO = op.PathInfoReply(None, "a" * 64, (HELLO,), 1, 128)


class Daemon:
    """Answers a few requests through a real socket."""

    def __init__(self, case: TestCase) -> None:
        self.path = temporary_directory(case) + "/socket"
        server = socket.socket(socket.AF_UNIX)
        server.bind(self.path)
        server.listen()
        self.sessions: list[Recorder] = []
        self.answers: dict[type, Any] = {}
        self.refuse = ""
        self.listener = Listener(reactor, server, self.begin, store=StoreDirectory())
        self.listener.start()
        case.addCleanup(self.listener.stop)

    def begin(self, connection: Connection, greeting: Greeting) -> Recorder:
        if self.refuse:
            raise StoreError(self.refuse)
        session = Recorder(connection, self.answers)
        self.sessions.append(session)
        return session

    def reply(self, kind: type[op.Operation[Any]], value: Any) -> None:
        """Always answer requests of KIND with VALUE, or raise it."""

        def answer(operation: op.Operation[Any]) -> bytes:
            if isinstance(value, Exception):
                raise value
            return encode_reply(operation, value)

        self.answers[kind] = answer


class Clients(TestCase):
    """Each method, and what may go wrong."""

    def setUp(self) -> None:
        self.daemon = Daemon(self)
        self.log: list[bytes] = []

    async def client(self) -> Client:
        client = await connect(UNIXClientEndpoint(reactor, self.daemon.path), log=self.log.append)
        self.addCleanup(client.close)
        return client

    @asynchronous
    async def test_methods(self) -> None:
        """Every method sends its request and returns the reply."""
        paths, path = (HELLO,), str(HELLO)
        options = op.SetOptions(False, True, False, 0, pairs=(("a", "b"),), use_offload=False,
                                build_verbosity=0, log_type=0, print_build_trace=True,
                                use_substitutes=True)  # fmt: skip
        cases: list[tuple[str, tuple[Any, ...], op.Operation[Any], Any]] = [
            ("is_valid_path", (path,), op.IsValidPath(path), True),
            ("valid_paths", (paths,), op.QueryValidPaths(paths), paths),
            ("all_valid_paths", (), op.QueryAllValidPaths(), paths),
            ("path_info", (path,), op.QueryPathInfo(HELLO), INFO),
            ("path_hash", (path,), op.QueryPathHash(HELLO), "a" * 64),
            ("references", (path,), op.QueryReferences(HELLO), ()),
            ("referrers", (path,), op.QueryReferrers(HELLO), paths),
            ("deriver", (path,), op.QueryDeriver(HELLO), None),
            ("valid_derivers", (path,), op.QueryValidDerivers(HELLO), paths),
            ("derivation_outputs", (path,), op.QueryDerivationOutputs(HELLO), paths),
            ("derivation_output_names", (path,), op.QueryDerivationOutputNames(HELLO), ("out",)),
            ("path_from_hash_part", ("x",), op.QueryPathFromHashPart("x"), HELLO),
            ("has_substitutes", (path,), op.HasSubstitutes(HELLO), False),
            ("substitutable_paths", (paths,), op.QuerySubstitutablePaths(paths), ()),
            (
                "substitutable_path_info",
                (path,),
                op.QuerySubstitutablePathInfo(path),
                op.SubstitutableInfo(HELLO, paths, 1, 2),
            ),
            (
                "substitutable_path_infos",
                (paths,),
                op.QuerySubstitutablePathInfos(paths),
                (op.SubstitutablePathInfo(HELLO, None, (), 1, 2),),
            ),
            ("substitute_urls", (), op.SubstituteURLs(), ("https://b", "https://a")),
            ("builtin_builders", (), op.BuiltinBuilders(), ("download", "git-download")),
            ("failed_paths", (), op.QueryFailedPaths(), paths),
            ("find_roots", (), op.FindRoots(), (("/link", path),)),
            ("add_text", ("n", b"t", paths), op.AddTextToStore("n", b"t", paths), HELLO),
            ("set_options", (options,), options, None),
            ("build_paths", (paths, 2), op.BuildPaths(paths, 2), None),
            ("ensure_path", (path,), op.EnsurePath(HELLO), None),
            ("clear_failed_paths", (["*"],), op.ClearFailedPaths(("*",)), None),
            ("add_temp_root", (path,), op.AddTempRoot(HELLO), None),
            ("add_indirect_root", ("/link",), op.AddIndirectRoot("/link"), None),
            ("sync_with_gc", (), op.SyncWithGC(), None),
            (
                "collect_garbage",
                (2,),
                op.CollectGarbage(2, (), False, 2**64 - 1),
                op.Collected(paths, 5),
            ),
            ("optimise_store", (), op.OptimiseStore(), None),
            ("verify_store", (), op.VerifyStore(False, False), False),
        ]
        client = await self.client()
        self.assertEqual(client.version, 0x164)
        for method, arguments, request, reply in cases:
            self.daemon.reply(type(request), reply)
            self.assertEqual(await getattr(client, method)(*arguments), reply, method)
            self.assertEqual(self.daemon.sessions[0].events[-1], request, method)
        others = {op.AddToStore, op.ExportPath, op.ImportPaths}
        self.assertEqual({type(case[2]) for case in cases} | others, set(op.OPERATIONS.values()))

    @asynchronous
    async def test_order(self) -> None:
        """Calls that are made together are carried out one after the other."""
        self.daemon.reply(op.IsValidPath, True)
        self.daemon.reply(op.QueryPathHash, "x")
        client = await self.client()
        calls = [client.is_valid_path(HELLO), client.path_hash(HELLO), client.is_valid_path("/x")]
        self.assertEqual([await call for call in calls], [True, "x", True])

    @asynchronous
    async def test_failures(self) -> None:
        """P24: the text and status of a failure, after which the client is usable."""
        self.daemon.reply(op.BuildPaths, BuildError("build of `x' failed", 100))
        self.daemon.reply(op.IsValidPath, True)
        client = await self.client()
        error = await self.assertFailure(client.build_paths([HELLO]), RequestFailed)
        self.assertEqual((error.text, error.status), ("build of `x' failed", 100))
        self.assertTrue(await client.is_valid_path(HELLO))
        self.daemon.reply(op.BuildPaths, ProtocolError("never"))
        await self.assertFailure(client.build_paths([HELLO]), RequestFailed)
        await self.assertFailure(client.is_valid_path(HELLO), Disconnected)

    @asynchronous
    async def test_refused(self) -> None:
        """P4: a daemon that cannot open its store says so."""
        self.daemon.refuse = "no store"
        error = await self.assertFailure(Deferred.fromCoroutine(self.client()), RequestFailed)
        self.assertEqual(error.text, "no store")

    @asynchronous
    async def test_log(self) -> None:
        """The log of a build comes while it runs."""

        async def build(operation: op.Operation[None]) -> bytes:
            connection = self.daemon.sessions[0].connection
            connection.next(b"one\n")
            connection.next(b"two\n")
            return encode_reply(operation, None)

        self.daemon.answers[op.BuildPaths] = build
        client = await self.client()
        await client.build_paths([HELLO])
        self.assertEqual(self.log, [b"one\n", b"two\n"])

    @asynchronous
    async def test_cancel(self) -> None:
        """P27: cancelling a call closes the connection, which cancels the work."""
        fate: list[str] = []
        started: Deferred[None] = Deferred()

        def build(operation: object) -> Deferred[bytes]:
            started.callback(None)
            return Deferred(lambda work: fate.append("cancelled"))

        self.daemon.answers[op.BuildPaths] = build
        client = await self.client()
        call = client.build_paths([HELLO])
        await started
        call.cancel()
        await self.assertFailure(call, CancelledError)
        await self.daemon.sessions[0].over
        self.assertEqual(fate, ["cancelled"])
        await self.assertFailure(client.sync_with_gc(), Disconnected)

    @asynchronous
    async def test_cancelled_greeting(self) -> None:
        """P27: who does not wait for the greeting any more is told of no other failure."""
        path = temporary_directory(self) + "/silent"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen()
            connecting = Deferred.fromCoroutine(connect(UNIXClientEndpoint(reactor, path)))
            server, _ = await deferToThread(listening.accept)
        with server:
            await deferToThread(server.recv, 1)
            connecting.cancel()
            await self.assertFailure(connecting, CancelledError)
            while await deferToThread(server.recv, 4096):
                pass
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    @asynchronous
    async def test_lost_while_adding(self) -> None:
        """P14: nothing more of an archive is read when the daemon has gone."""

        def add(operation: object) -> Deferred[bytes]:
            self.daemon.sessions[0].connection.abort()
            return Deferred()

        self.daemon.answers[op.AddToStore] = add
        client = await self.client()
        blocks = iter([bytes(1 << 20)] * 20)
        await self.assertFailure(client.add_nar("large", blocks), Disconnected)
        self.assertGreater(len(list(blocks)), 10)

    @asynchronous
    async def test_add(self) -> None:
        """P14: archives of any size follow the request, as fast as the daemon takes them."""
        got: list[bytes] = []

        def add(operation: op.AddToStore) -> Deferred[bytes]:
            connection = self.daemon.sessions[0].connection
            done: Deferred[bytes] = Deferred()

            class Taker:
                taken = 0

                def received(self, data: bytes) -> None:
                    got.append(data)
                    self.taken += len(data)
                    if self.taken == size:
                        connection.give_back(b"")
                        done.callback(encode_reply(operation, HELLO))

            connection.take_over(Taker())
            return done

        self.daemon.answers[op.AddToStore] = add
        client = await self.client()
        directory = temporary_directory(self)
        Path(directory + "/file").write_bytes(bytes(3_000_000))
        os.mkdir(directory + "/empty")
        os.symlink("file", directory + "/link")
        for recursive in (True, False):
            archive = b"".join(nar_of_tree(directory))
            size = len(archive)
            got.clear()
            added = await client.add_tree("name", directory, recursive=recursive)
            self.assertEqual(added, HELLO)
            self.assertEqual(b"".join(got), archive)
            self.assertEqual(
                self.daemon.sessions[0].events[-1],
                op.AddToStore("name", True, recursive, "sha256"),
            )

    @asynchronous
    async def test_bad_source(self) -> None:
        """What cannot be read leaves no half request behind: the connection ends."""

        class Taker:
            def received(self, data: bytes) -> None: ...

        def add(operation: object) -> Deferred[bytes]:
            self.daemon.sessions[0].connection.take_over(Taker())
            return Deferred()

        self.daemon.answers[op.AddToStore] = add
        client = await self.client()
        await self.assertFailure(client.add_tree("x", "/nonexistent"), FileNotFoundError)
        await self.daemon.sessions[0].over

    @asynchronous
    async def test_export_and_import(self) -> None:
        """P29: what is exported comes in pieces; what is imported is pulled."""

        async def export(operation: op.ExportPath) -> bytes:
            for piece in (b"abc", b"", b"def"):
                self.daemon.sessions[0].connection.send(encode_write(piece))
            return encode_reply(operation, None)

        got: list[bytes] = []

        async def import_(operation: op.ImportPaths) -> bytes:
            answers = Answers(self.daemon.sessions[0].connection)
            while data := await answers.take():
                got.append(data)
            await answers.finish()
            return encode_reply(operation, (HELLO,))

        self.daemon.answers[op.ExportPath] = export
        self.daemon.answers[op.ImportPaths] = import_
        client = await self.client()
        pieces: list[bytes] = []
        await client.export_path(HELLO, pieces.append)
        self.assertEqual(b"".join(pieces), b"abcdef")
        large = bytes(40000)
        self.assertEqual(await client.import_paths([b"ab", b"", large, b"gh"]), (HELLO,))
        self.assertEqual(b"".join(got), b"ab" + large + b"gh")


class Trees(TestCase):
    """Serialising what is to be added."""

    def test_file(self) -> None:
        """N11: single files and links; other types are refused."""
        directory = temporary_directory(self)
        Path(directory + "/f").write_bytes(b"contents\n")
        self.assertEqual(b"".join(nar_of_tree(directory + "/f")), nar_of_file(b"contents\n"))
        os.chmod(directory + "/f", 0o755)
        self.assertEqual(b"".join(nar_of_tree(directory + "/f")), nar_of_file(b"contents\n", True))
        os.mkfifo(directory + "/fifo")
        self.assertRaises(GuixdError, list, nar_of_tree(directory))

    def test_recorded(self) -> None:
        """The archive of a tree is the one that the stock client sent for it."""
        from tests.formats.test_golden import read_client
        from tests.golden.record import load

        directory = temporary_directory(self)
        os.mkdir(directory + "/sub")
        for name, text, mode in (
            ("file", b"contents\n", 0o644),
            ("sub/run", b"#!/bin/sh\n", 0o755),
        ):
            Path(f"{directory}/{name}").write_bytes(text)
            os.chmod(f"{directory}/{name}", mode)
        os.symlink("../file", directory + "/sub/link")
        sent = b"".join(data for side, data in load("add-recursive") if side == ">")
        _, [(_, archive)] = read_client(sent)
        self.assertEqual(b"".join(nar_of_tree(directory)), archive)
