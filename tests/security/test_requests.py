"""Requests that attack, over sockets, on a whole daemon: others are not disturbed."""

from __future__ import annotations

import errno
import os
import resource
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import gatherResults
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater

from guixd.client import Client
from guixd.formats import operations as op
from guixd.formats.messages import LAST, Failed, Greeting
from guixd.formats.nar import nar_of_file
from guixd.formats.wire import encode_int, encode_string
from guixd.service import changes, queries
from guixd.store.queries import Queries
from tests.archives import File, Link, archive, directory, entry, words
from tests.service.world import DaemonCase, EndpointAs, RawClient, messages, set_options
from tests.support import requires_root

MIB = 1024 * 1024
FOREIGNER = 61998


def resident() -> int:
    """Return how many bytes of memory this process, daemon and test, uses now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class HostileCase(DaemonCase):
    """A daemon with a client that must not notice anything of what others do."""

    timeout = 60

    async def begin(self) -> Client:
        """Open the store, and return the client that is to be left in peace."""
        bystander = await self.client()
        self.before = sorted(os.listdir(self.store.path))
        return bystander

    async def unharmed(self, bystander: Client) -> None:
        """Test that nothing was added, nothing is left, and the bystander is served."""
        self.assertEqual(await bystander.all_valid_paths(), ())
        self.assertEqual(self.names(), self.before)
        path = await bystander.add_text("fine", b"fine")
        self.assertTrue(await bystander.is_valid_path(path))

    def names(self) -> list[str]:
        """Return what is in the store, without the staging place that additions use again."""
        return sorted(os.listdir(self.store.path))


class MalformedTests(HostileCase):
    async def test_no_client(self) -> None:
        """P2: what does not begin as a client does gets no byte."""
        bystander = await self.begin()
        for first in (b"GET / HTTP/1.1\r\n\r\n", bytes(8), b"cxin\1\0\0\0", os.urandom(64)):
            client = await self.unix.connect(Factory.forProtocol(RawClient))
            client.transport.write(first)
            self.assertEqual(await client.closed, b"")
        await self.unharmed(bystander)

    async def test_truncated(self) -> None:
        """N6, P27: an addition that ends after any byte adds nothing and leaves nothing."""
        bystander = await self.begin()
        tree = archive({b"a": File(b"x" * 9), b"l": Link(b"a")})
        sent = Greeting().encode() + op.AddToStore("t", True, True, "sha256").encode() + tree
        clients = []
        for size in range(0, len(sent) - 1, 3):
            client = await self.unix.connect(Factory.forProtocol(RawClient))
            client.transport.write(sent[:size])
            client.transport.loseWriteConnection()
            clients.append(client.closed)
        await gatherResults(clients)
        while self.names() != self.before:  # the end of a connection is not yet that of its work
            await deferLater(reactor, 0)
        await self.unharmed(bystander)

    async def test_oversized(self) -> None:
        """P5: lengths and counts that are too large are refused before anything comes."""
        bystander = await self.begin()
        opcode = {name: encode_int(kind.opcode) for name, kind in vars(op).items()
                  if hasattr(kind, "opcode")}  # fmt: skip
        large = encode_int(0xFFFFFFFF)
        for request in (
            opcode["IsValidPath"] + large,
            opcode["IsValidPath"] + encode_int(MIB),
            opcode["IsValidPath"] + struct.pack("<Q", 1 << 63),
            opcode["AddTextToStore"] + encode_string("x") + large,
            opcode["AddToStore"] + large,
            op.AddToStore("x", True, True, "sha256").encode() + struct.pack("<Q", 1 << 62),
        ):
            error = await self.refused(request)
            self.assertTrue(error.text, request)
        await self.unharmed(bystander)

    async def test_promises(self) -> None:
        """P5: a count that promises gigabytes takes no memory before they come."""
        bystander = await self.begin()
        opcodes = (op.QueryValidPaths, op.BuildPaths, op.ClearFailedPaths)
        starts = [encode_int(kind.opcode) for kind in opcodes] + [set_options().encode()[:-8]]
        before = resident()
        clients = [await self.raw(None, start + encode_int(0xFFFFFFFF)) for start in starts * 8]
        await bystander.sync_with_gc()
        self.assertLess(resident() - before, 16 * MIB)
        for client in clients:
            client.transport.loseConnection()
            await client.closed
        await self.unharmed(bystander)

    async def test_unknown_operations(self) -> None:
        """P8: a number that stands for nothing ends the connection."""
        bystander = await self.begin()
        for number in (0, 2, 15, 17, 36, 99, 0xFFFFFFFF):
            error = await self.refused(encode_int(number))
            self.assertIn("invalid operation", error.text)
        await self.unharmed(bystander)

    async def test_deep_archive(self) -> None:
        """CVE-2026-44028: an archive of a hundred thousand directories in each other."""
        bystander = await self.begin()
        level = words(b"(", b"type", b"directory", b"entry", b"(", b"name", b"a", b"node")
        request = op.AddToStore("deep", True, True, "sha256").encode()
        error = await self.refused(request + words(b"nix-archive-1") + level * 100_000)
        self.assertIn("deep", error.text)
        await self.unharmed(bystander)

    async def test_hostile_archives(self) -> None:
        """CVE-2024-45593, N7, N8, N9: entries that would lead elsewhere write nothing there."""
        bystander = await self.begin()
        outside = Path(self.directory, "outside")
        outside.mkdir()
        link = entry(b"d", Link(os.fsencode(outside)))
        through = entry(b"d", {b"f": File(b"planted")})
        for request in (
            directory(link, through),
            directory(link, entry(b"d/f", File(b"planted"))),
            directory(entry(b"../outside/f", File(b"planted"))),
            directory(entry(b"..", {b"f": File(b"planted")})),
            directory(entry(b".", File())),
            directory(entry(b"", File())),
            directory(entry(b"a\0b", File())),
            directory(entry(b"b", File()), entry(b"a", File())),
            directory(entry(b"n" * 5000, File())),
        ):
            await self.refused(op.AddToStore("t", True, True, "sha256").encode() + request)
        self.assertEqual(os.listdir(outside), [])
        await self.unharmed(bystander)


class RefusedTests(HostileCase):
    async def test_names(self) -> None:
        """S3, P7: bad names and paths are errors, after which all goes on."""
        bystander = await self.begin()
        client = await self.client()
        for name in ("a/b", "..", ".hidden", "a b", "ä", "a\0b", "../../etc/passwd", "n" * 300):
            await self.fails(client.add_text(name, b"x"))
            await self.fails(client.add_nar(name, [nar_of_file(b"x")]))
            await self.fails(client.add_text(name + ".drv", b"Derive([],[],[],"))
        for outside in ("/etc/passwd", self.store.path, self.store.path + "/", "", "\0"):
            self.assertIn("not in the store", await self.fails(client.is_valid_path(outside)))
        for path in (self.store.path + "/..", self.store.path + "/.links", self.path("x" * 4000)):
            self.assertFalse(await client.is_valid_path(path))
        for algorithm in ("", "sha3", "SHA256", "r:sha256", "md5\0"):
            await self.fails(client.add_nar("x", [nar_of_file(b"x")], algorithm=algorithm))
        await self.unharmed(bystander)

    async def test_lying_derivations(self) -> None:
        """D2, D3, D5, D7: a derivation that lies about its outputs becomes nothing."""
        bystander = await self.begin()
        client = await self.client()
        true = self.store.child("0" * 32 + "-x")
        other = self.store.child("1" * 32 + "-y.drv")

        def text(outputs: str, inputs: str = "[]", variable: str = f'("out","{true}")') -> bytes:
            environment = f'[("name","x"),{variable}]'
            return f'Derive({outputs},{inputs},[],"s","/b",[],{environment})'.encode()

        for wrong in (
            text(f'[("out","{true}","","")]'),
            text('[("out","/etc/passwd","","")]', variable='("out","/etc/passwd")'),
            text(f'[("out","{self.store.path}/.links","","")]'),
            text(f'[("out","{true}","sha256","{"0" * 62}")]'),
            text(f'[("out","{true}","sha257","{"0" * 64}")]'),
            text(f'[("out","{true}","","")]', f'[("{other}",["out"])]'),
            text(f'[("out","{true}","","")]')[:-9],
            b"",
            b"Derive(" + b"[" * 100_000,
        ):
            error = await self.fails(client.add_text("x.drv", wrong))
            self.assertNotIn("internal error", error)
            error = await self.fails(client.add_nar("x.drv", [nar_of_file(wrong)]))
            self.assertNotIn("internal error", error)
        await self.fails(client.add_nar("x.drv", [archive({})]))
        await self.unharmed(bystander)

    async def test_nowhere_to_protect(self) -> None:
        """P14: an archive that nothing can be done with is no sequence of requests."""
        bystander = await self.begin()
        client = await self.client()
        roots = self.directory + "/var/temproots"
        os.rename(roots, roots + "-gone")
        for size in 50, 100_000:
            hidden = op.AddTextToStore("hidden", b"x" * size, ()).encode()
            text = await self.fails(client.add_nar("x", [nar_of_file(hidden)]))
            self.assertIn("temproots", text)
            self.assertFalse(await client.is_valid_path(self.path("x")))
        os.rename(roots + "-gone", roots)
        await self.unharmed(bystander)

    async def test_settings(self) -> None:
        """P21, O16: limits of any size are taken, and the daemon goes on."""
        bystander = await self.begin()
        client = await self.client()
        largest = str((1 << 63) - 1)
        pairs = (
            ("build-timeout", largest),
            ("build-max-silent-time", largest),
            ("build-max-jobs", "-1"),
            ("build-cores", "4294967295"),
        )
        await client.set_options(set_options(*pairs))
        building = client.build_paths([self.path("x.drv")])
        request, _observer, done = await self.builder.arrivals.get()
        self.assertEqual(request.options.timeout, int(largest))
        done.callback(None)
        await building
        await self.unharmed(bystander)


@requires_root
class OtherUserTests(HostileCase):
    @property
    def foreigner(self) -> EndpointAs:
        """Where an ordinary user connects."""
        return EndpointAs(self.daemon.socket, FOREIGNER)

    async def test_profiles(self) -> None:
        """CVE-2019-18192: nobody can make the profile directory of somebody else."""
        await self.begin()
        profiles = self.directory + "/var/profiles/per-user"
        self.assertEqual(os.stat(profiles).st_mode & 0o7777, 0o755)
        self.assertEqual(os.stat(profiles).st_uid, 0)
        self.assertEqual(os.stat(profiles + "/root").st_uid, 0)
        os.seteuid(FOREIGNER)
        try:
            with self.assertRaises(PermissionError):
                os.mkdir(profiles + "/somebody")
        finally:
            os.seteuid(0)

    async def test_privileges(self) -> None:
        """P17, P18: repairing is for the trusted; of builds only, it ends the connection."""
        bystander = await self.begin()
        client = await self.raw(self.foreigner, op.BuildPaths((self.path("x.drv"),), 1))
        error = messages(await client.closed)[-1]
        assert isinstance(error, Failed)
        self.assertIn("privileged", error.text)
        client = await self.raw(self.foreigner, op.VerifyStore(False, True), op.SyncWithGC())
        await client.received(b"ptxc")
        client.transport.loseWriteConnection()
        found = await client.closed
        self.assertTrue(found.endswith(LAST + encode_int(1)), found[-40:])
        await self.unharmed(bystander)

    async def test_untrusted_settings(self) -> None:
        """P22: who is not trusted cannot set what concerns the daemon."""
        await self.begin()
        client = await self.raw(
            self.foreigner,
            set_options(("build-max-log-size", "1"), ("build-use-chroot", "false")),
            op.BuildPaths((self.path("x.drv"),)),
        )
        request, _observer, done = await self.builder.arrivals.get()
        self.assertEqual(request.options.max_log_size, 0)
        self.assertEqual(request.options.client_uid, FOREIGNER)
        done.callback(None)
        client.transport.loseConnection()


@requires_root
class FullDiskTests(HostileCase):
    """The store, the database and the roots are on a small disk, which is full."""

    def setUp(self) -> None:
        super().setUp()
        self.disk = self.directory + "/disk"
        os.mkdir(self.disk)
        mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", self.disk]
        subprocess.run(mount, check=True)
        self.addCleanup(self.unmount)
        for name in "store", "var":
            os.mkdir(f"{self.disk}/{name}")
            os.makedirs(f"{self.directory}/{name}", exist_ok=True)
            subprocess.run(
                ["mount", "--bind", f"{self.disk}/{name}", f"{self.directory}/{name}"], check=True
            )
        # The socket was made below the mount.
        self.daemon.service.listeners.stopService()
        self.daemon = self.make(builder=self.builder)
        self.daemon.start()
        self.addCleanup(self.daemon.stop)

    def unmount(self) -> None:
        for name in "store", "var", "disk":
            subprocess.run(["umount", f"{self.directory}/{name}"], check=True)

    async def test_full(self) -> None:
        """S5, S11: with no byte left, additions are errors; queries and old clients go on."""
        client = await self.client()
        item = await client.add_text("before", b"x" * 5000)
        self.before = sorted(os.listdir(self.store.path))
        filler = self.disk + "/filler"
        with Path(filler).open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                self.assertEqual(error.errno, errno.ENOSPC)
        for _ in range(3):
            for size in 10_000, 400_000, 30 * MIB:
                self.assertIn("space", await self.fails(client.add_text("t", b"x" * size)))
                nar = nar_of_file(b"x" * size)
                self.assertIn("space", await self.fails(client.add_nar("t", [nar])))
        self.assertEqual(await client.all_valid_paths(), (item,))
        self.assertTrue(await client.is_valid_path(item))
        self.assertEqual(self.names(), self.before)
        os.unlink(filler)
        path = await client.add_text("after", b"x" * 10_000)
        self.assertEqual(await client.valid_paths([item, path]), tuple(sorted([item, path])))


class LongListTests(HostileCase):
    async def test_many_paths(self) -> None:
        """P11: a question about very many paths is answered rightly, and delays nobody."""
        bystander = await self.begin()
        client = await self.client()
        valid = [await client.add_text(name, b"x") for name in ("a", "b", "c")]
        asked = [self.store.child(f"{n:032}-x") for n in range(queries.MOST_ASKED)] + valid
        looked: list[threading.Thread] = []
        look = Queries.valid_paths

        def note(self: Queries, paths: Any) -> Any:
            looked.append(threading.current_thread())
            return look(self, paths)

        self.patch(Queries, "valid_paths", note)
        answer = client.valid_paths(asked)
        self.assertTrue(await bystander.is_valid_path(valid[0]))
        self.assertEqual(await answer, tuple(sorted(valid)))
        self.assertGreater(len(looked), 2)
        self.assertNotIn(threading.main_thread(), looked)

    async def test_many_failures(self) -> None:
        """S33: very many failures are forgotten in several steps, between which others come."""
        bystander = await self.begin()
        client = await self.client()
        failed = self.path("failed")
        store = self.daemon.service.daemon._store
        store.database.add_failed([failed])
        clear, steps = store.database.clear_failed, []
        self.patch(store.database, "clear_failed", lambda w: (steps.append(len(w)), clear(w)))
        words = [f"{n}" for n in range(3 * changes.CLEARED_AT_ONCE)] + [failed]
        clearing = client.call(op.ClearFailedPaths(tuple(words)))
        self.assertEqual(await client.failed_paths(), ())
        await clearing
        self.assertEqual(steps, [changes.CLEARED_AT_ONCE] * 3 + [1])
        await self.unharmed(bystander)
