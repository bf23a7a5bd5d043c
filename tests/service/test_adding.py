"""Adding to the store over a socket."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase

from guixd.client import nar_of_tree
from guixd.errors import BadArchive
from guixd.formats import derivation
from guixd.formats import operations as op
from guixd.formats.messages import LAST
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from guixd.formats.wire import encode_int, encode_string
from guixd.service import adding
from guixd.store.local import LocalStore
from tests.service.world import DaemonCase, set_options
from tests.support import requires_root

MIB = 1024 * 1024


class AddingCase(DaemonCase):
    def leftovers(self) -> list[str]:
        """Return the names of what additions left behind in the store directory."""
        return [name for name in os.listdir(self.store.path) if name.startswith("guixd-")]

    def tree(self, files: int = 3, size: int = 5) -> str:
        """Return a directory with FILES of SIZE bytes."""
        top = Path(self.directory, "tree")
        (top / "sub").mkdir(parents=True)
        for number in range(files):
            (top / "sub" / f"f{number}").write_bytes(bytes([number % 251]) * size)
        (top / "link").symlink_to("sub/f0")
        return str(top)


class ArchiveTests(AddingCase):
    async def test_tree(self) -> None:
        """A tree gets the path and the hash of its archive."""
        client = await self.client()
        tree = self.tree()
        nar = b"".join(nar_of_tree(tree))
        digest = hashlib.sha256(nar).digest()
        path = await client.add_tree("tree", tree)
        self.assertEqual(path, self.store.source_path("tree", digest))
        info = await client.path_info(path)
        self.assertEqual((info.nar_hash, info.nar_size), (digest.hex(), len(nar)))
        self.assertEqual(Path(path, "link").read_bytes(), b"\0" * 5)
        self.assertEqual(self.leftovers(), [])

    async def test_compatibility(self) -> None:
        """P12, P13: values other than 1 mean 0; not fixed means recursive sha256."""
        client = await self.client()
        nar = nar_of_file(b"contents")
        expected = self.store.source_path("x", hashlib.sha256(nar).digest())
        flat = self.store.fixed_path("x", "md5", False, hashlib.md5(b"contents").digest())
        for fixed, recursive, algorithm, path in (
            (1, 1, "sha256", expected),
            (0, 0, "nonsense", expected),
            (2, 0, "md5", expected),
            (1, 2, "md5", flat),
            (1, 0, "md5", flat),
        ):
            raw = await self.raw(
                None,
                *(n.to_bytes(8, "little") for n in (7,)),
                encode_string("x"),
                fixed.to_bytes(8, "little"),
                recursive.to_bytes(8, "little"),
                encode_string(algorithm),
                nar,
            )
            raw.transport.loseWriteConnection()
            self.assertTrue((await raw.closed).endswith(encode_string(path)), (fixed, recursive))
            self.assertTrue(await client.is_valid_path(path))

    async def test_pieces(self) -> None:
        """However the archive is cut, and with requests around it, all are answered."""
        nar = nar_of_file(b"z" * 70000)
        path = self.store.source_path("x", hashlib.sha256(nar).digest())
        request = op.AddToStore("x", True, True, "sha256").encode() + nar
        stream = op.BuiltinBuilders().encode() + request + op.IsValidPath(path).encode()
        for size in (len(stream), 4096, 30011):
            client = await self.raw()
            for start in range(0, len(stream), size):
                client.transport.write(stream[start : start + size])
                await deferLater(reactor, 0)
            await client.received(encode_string(path) + LAST + encode_int(1))
            client.transport.loseConnection()
            await client.closed

    async def test_thread_ahead(self) -> None:
        """A thread that is done before the reactor looks makes no difference."""
        original = adding.Intake.received

        def received(intake: adding.Intake, data: bytes) -> None:
            original(intake, data)
            while intake._feeding and not intake._addition.complete:
                time.sleep(0)

        self.patch(adding.Intake, "received", received)
        nar = nar_of_file(b"z" * 2 * adding.INLINE)
        path = self.store.source_path("x", hashlib.sha256(nar).digest())
        request = op.AddToStore("x", True, True, "sha256").encode() + nar
        client = await self.raw(None, request, op.IsValidPath(path), op.BuiltinBuilders())
        await client.received(encode_string("git-download"))
        self.assertIn(encode_string(path) + LAST + encode_int(1), client.data)

    async def test_same_at_once(self) -> None:
        """Clients that add the same item at the same time all get it."""
        tree = self.tree(files=20, size=20000)
        clients = [await self.client() for _ in range(4)]
        paths = await gatherResults([client.add_tree("t", tree) for client in clients])
        self.assertEqual(len(set(paths)), 1)
        self.assertEqual(self.leftovers(), [])
        self.assertEqual(sorted(os.listdir(paths[0])), ["link", "sub"])

    async def test_again(self) -> None:
        """What is valid already stays as it is, and nothing else stays."""
        client = await self.client()
        tree = self.tree(files=5, size=100000)
        path = await client.add_tree("t", tree)
        before = os.stat(path).st_ino
        self.assertEqual(await client.add_tree("t", tree), path)
        self.assertEqual(os.stat(path).st_ino, before)
        self.assertEqual(self.leftovers(), [])


class BadArchiveTests(AddingCase):
    async def test_wrong_kind(self) -> None:
        """P14: a directory where a file is wanted is an error after which all goes on."""
        client = await self.client()
        for files, size in ((2, 5), (40, 10000)):
            with self.subTest(files=files):
                tree = self.tree(files, size)
                text = await self.fails(client.add_tree("t", tree, recursive=False))
                self.assertIn("regular file expected", text)
                subprocess.run(["rm", "-r", tree], check=True)
        self.assertEqual(await client.builtin_builders(), ("download", "git-download"))
        self.assertEqual(self.leftovers(), [])

    async def test_bad_values(self) -> None:
        """A bad name or algorithm is an error after which all goes on."""
        client = await self.client()
        nar = [nar_of_file(b"x")]
        self.assertIn("invalid name", await self.fails(client.add_nar("a b", nar)))
        self.assertIn("algorithm", await self.fails(client.add_nar("a", nar, algorithm="crc")))
        self.assertEqual(len(os.listdir(self.store.path)), 1)
        self.assertIsNotNone(await client.add_nar("a", nar))

    async def test_syntax(self) -> None:
        """P15: what is no archive ends the connection, sooner or later in it."""
        request = op.AddToStore("x", True, True, "sha256")
        good = nar_of_file(b"y" * 200000)
        broken = good[:-8] + b"\1" * 8
        for archive in (b"\7" * 64, b"\0" * 100000, broken):
            error = await self.refused(request, archive)
            self.assertTrue(error.text)
        self.assertEqual(self.leftovers(), [])

    async def test_leaving(self) -> None:
        """What a client left half sent is removed."""
        nar = nar_of_file(b"y" * (4 * MIB))
        for size in (100, 2 * MIB):
            begun: Deferred[None] = Deferred()
            self.patch(adding, "Intake", partial(NotedIntake, begun))
            client = await self.raw(None, op.AddToStore("x", True, True, "sha256"), nar[:size])
            await begun
            client.transport.loseConnection()
            await client.closed
        await self.daemon.stop()
        self.assertEqual(self.leftovers(), [])


class DerivationTests(AddingCase):
    async def test_read_in_a_thread(self) -> None:
        """S34, D5: an archive that is called a derivation is not read by the reactor."""
        client = await self.client()
        readers: list[threading.Thread] = []
        parse = derivation.parse

        def note(*arguments: Any) -> Any:
            readers.append(threading.current_thread())
            return parse(*arguments)

        self.patch(derivation, "parse", note)
        text = b'Derive([],[],[],"x86_64-linux","/b",[],[("name","x")])'
        path = await client.add_nar("x.drv", [nar_of_file(text)])
        self.assertEqual(await client.derivation_outputs(path), ())
        wrong = [nar_of_file(text[:-1])]
        self.assertIn("parsing", await self.fails(client.add_nar("y.drv", wrong)))
        self.assertEqual(len(readers), 2)
        self.assertNotIn(threading.main_thread(), readers)
        self.assertEqual(sorted(os.listdir(self.store.path)), sorted([".links", path.base]))


class NotedIntake(adding.Intake):
    """Tells when something has been written."""

    def __init__(self, begun: Deferred[None], *args: Any) -> None:
        super().__init__(*args)
        self._tell = begun

    def _fed(self, rest: bytes | None) -> None:
        super()._fed(rest)
        if not self._tell.called:
            self._tell.callback(None)


class StreamTests(AddingCase):
    async def test_back_pressure(self) -> None:
        """A client that is faster than the disk is held back; memory stays small."""
        most = 0
        original = adding.Intake.received

        def received(intake: adding.Intake, data: bytes) -> None:
            nonlocal most
            original(intake, data)
            most = max(most, intake._size)

        self.patch(adding.Intake, "received", received)
        block = os.urandom(MIB)
        size = 24 * MIB

        def archive() -> Iterator[bytes]:
            whole = nar_of_file(bytes(8))
            start = whole.index(b"contents") + 8
            yield whole[:start] + size.to_bytes(8, "little")
            for _ in range(size // MIB):
                yield block
            yield whole[start + 16 :]

        client = await self.client()
        path = await client.add_nar("big", archive())
        self.assertEqual(os.path.getsize(path), size)
        self.assertGreater(most, 0)
        self.assertLessEqual(most, adding.MOST_WAITING + MIB)

    async def test_others_go_on(self) -> None:
        """While one client adds much, another is answered."""
        big = await self.client()
        other = await self.client()

        def pieces() -> Iterator[bytes]:
            nar = nar_of_file(b"x" * MIB)
            yield nar[: MIB // 2]
            yield nar[MIB // 2 :]

        adding_big = big.add_nar("big", pieces())
        path = await other.add_text("small", b"x")
        self.assertTrue(await other.is_valid_path(path))
        self.assertTrue(await big.is_valid_path(await adding_big))


@requires_root
class FullDiskTests(AddingCase):
    def setUp(self) -> None:
        super().setUp()
        os.mkdir(self.store.path)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", self.store.path], check=True
        )
        self.addCleanup(subprocess.run, ["umount", self.store.path], check=True)

    async def test_full(self) -> None:
        """A full disk is an error for who adds; nothing of it stays, and others go on."""
        client = await self.client()
        tree = self.tree(files=40, size=100000)
        text = await self.fails(client.add_tree("t", tree))
        self.assertIn("space", text)
        self.assertIn("space", await self.fails(client.add_text("t", b"x" * (3 * MIB))))
        self.assertEqual(os.listdir(self.store.path), [".links"])
        self.assertEqual(await client.all_valid_paths(), ())
        path = await client.add_text("small", b"x")
        self.assertTrue(await client.is_valid_path(path))


class TextTests(AddingCase):
    async def test_text(self) -> None:
        client = await self.client()
        path = await client.add_text("hello.txt", b"Hello, store!\n")
        self.assertEqual(Path(path).read_bytes(), b"Hello, store!\n")
        self.assertEqual(os.stat(path).st_mode & 0o7777, 0o444)
        user = await client.add_text("user", b"x", [path])
        self.assertEqual(await client.references(user), (path,))

    async def test_errors(self) -> None:
        client = await self.client()
        self.assertIn("invalid name", await self.fails(client.add_text("a/b", b"x")))
        absent = self.path("absent")
        self.assertIn("not valid", await self.fails(client.add_text("a", b"x", [absent])))
        self.assertIn("parsing", await self.fails(client.add_text("a.drv", b"nonsense")))
        self.assertEqual(os.listdir(self.store.path), [".links"])

    async def test_long(self) -> None:
        """A long text is added in a thread, with the same outcome."""
        client = await self.client()
        text = os.urandom(2 * MIB)
        path = await client.add_text("long", text)
        self.assertEqual(Path(path).read_bytes(), text)
        self.assertEqual(path, self.store.text_path("long", hashlib.sha256(text).digest(), []))


HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.lockf(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


class BusyTests(AddingCase):
    async def hold(self, file: str) -> subprocess.Popen[bytes]:
        """Let another process have the lock FILE until its standard input ends."""
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.stdin.close)
        self.addCleanup(process.stdout.close)
        process.stdout.readline()
        return process

    async def test_collector(self) -> None:
        """While somebody else collects, additions wait, the client is told, others go on."""
        client = await self.client()
        await client.set_options(set_options(verbosity=1))
        told: Deferred[None] = Deferred()
        client.log = lambda line: None if told.called else told.callback(None)
        other = await self.client()
        collector = await self.hold(self.directory + "/var/gc.lock")
        text = client.add_text("x", b"y")
        sync = other.sync_with_gc()
        await told
        third = await self.client()
        self.assertEqual(await third.all_valid_paths(), ())
        self.assertFalse(text.called)
        self.assertFalse(sync.called)
        collector.stdin.close()
        path: StorePath = await text
        await sync
        self.assertTrue(await client.is_valid_path(path))

    async def test_store(self) -> None:
        """P34: while another process has the whole store, the handshake waits, with one line."""
        self.patch(LocalStore, "ensure_user_directory", lambda *_: "a second line")
        os.makedirs(self.directory + "/var/db")
        holder = await self.hold(self.directory + "/var/db/big-lock")
        waiting = await self.raw()
        await waiting.received(b"big lock")
        self.assertNotIn(LAST, waiting.data)
        holder.stdin.close()
        await waiting.received(LAST)
        self.assertNotIn(b"a second line", waiting.data)
        later = await self.raw()
        await later.received(LAST)

    async def test_leaving(self) -> None:
        """A client that waits for a lock can leave."""
        collector = await self.hold(self.directory + "/var/gc.lock")
        client = await self.raw(None, op.AddTextToStore("x", b"y", ()))
        await client.received(b"; waiting\n")
        client.transport.loseConnection()
        await client.closed
        await self.daemon.stop()
        collector.stdin.close()
        self.assertFalse([n for n in os.listdir(self.store.path) if n.endswith("-x")])


class IntakeTests(SynchronousTestCase):
    def test_after_a_fault(self) -> None:
        """What comes after the first fault of an archive is not looked at any more."""
        begun: list[Deferred[None]] = []

        def threads(_function: object, *_arguments: object) -> Deferred[None]:
            begun.append(Deferred())
            return begun[-1]

        unused: Any = None
        calls: Any = threads
        intake = adding.Intake(unused, unused, calls)
        intake.received(bytes(adding.INLINE + 1))
        intake.received(b"more")
        begun[0].errback(BadArchive("no archive"))
        self.failureResultOf(intake.done, BadArchive)
        for _ in range(3):
            intake.received(bytes(adding.INLINE + 1))
        self.assertEqual(len(begun), 1)
