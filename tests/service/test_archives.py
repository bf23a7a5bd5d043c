"""Exporting and importing over a socket (spec: store §12)."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater

from guixd.client import Client
from guixd.formats import derivation, sexp
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from guixd.formats.wire import encode_bytes, encode_int, encode_long
from guixd.signatures import KeyPair, read_key_pair, sign
from guixd.store.importing import Import
from tests.service.world import DaemonCase
from tests.signatures.keys import configuration, golden, install
from tests.support import open_names

MAGIC = 0x4558494E
T1 = "a52a4044c155daf0c5627e2bd8c72713d8f7503fe073d9cd83433eb50dca855c"


class ArchiveCase(DaemonCase):
    """A daemon that trusts its own key."""

    def setUp(self) -> None:
        super().setUp()
        self.configuration = Path(self.directory, "etc")
        install(self.configuration, acl=True)
        self.host = read_key_pair(str(self.configuration))
        self.stranger = read_key_pair(str(configuration(self, "rsa")))

    def leftovers(self) -> list[str]:
        """Return what lies in the store and is no item."""
        return [name for name in os.listdir(self.store.path) if name.startswith("guixd-")]

    async def export(self, client: Client, *paths: StorePath, sign: bool = True) -> bytes:
        """Return a stream as clients make it."""
        out = bytearray()
        for path in paths:
            out += encode_long(1)
            await client.export_path(path, out.extend, sign=sign)
        return bytes(out + encode_long(0))

    async def delete(self, *paths: StorePath) -> None:
        client = await self.client()
        await client.collect_garbage(3, paths)
        await client.close()

    def archive(
        self,
        path: str,
        nar: bytes,
        references: tuple[str, ...] = (),
        *,
        deriver: str = "",
        keys: KeyPair | None = None,
        signed: bool = True,
        magic: int = MAGIC,
    ) -> bytes:
        """Return one item of a stream, made by hand."""
        body = nar + encode_int(magic) + encode_bytes(path.encode())
        body += encode_int(len(references))
        body += b"".join(encode_bytes(each.encode()) for each in references)
        body += encode_bytes(deriver.encode())
        if not signed:
            return encode_long(1) + body + encode_int(0)
        signature = sign(hashlib.sha256(body).digest(), keys or self.host)
        return encode_long(1) + body + encode_int(1) + encode_bytes(signature)


END = encode_long(0)


class RoundTrips(ArchiveCase):
    async def test_texts(self) -> None:
        """P29, S27: several items in one stream, which comes in any pieces."""
        client = await self.client()
        first = await client.add_text("a", b"a", ())
        second = await client.add_text("b", b"b" * 100_000, [first])
        archive = await self.export(client, first, second)
        await client.close()
        info = [await (await self.client()).path_info(path) for path in (first, second)]
        for size in (1, 7, 1000, len(archive)):
            if size == 1:
                part = archive[:2000]  # a bit, byte by byte
                pieces = [part[n : n + 1] for n in range(len(part))] + [archive[2000:]]
            else:
                pieces = [archive[n : n + size] for n in range(0, len(archive), size)]
            await self.reset()
            client = await self.client()
            self.assertEqual(list(await client.import_paths(pieces)), [first, second])
            for path, before in zip((first, second), info, strict=True):
                after = await client.path_info(path)
                self.assertEqual(
                    (after.nar_hash, after.nar_size, after.references),
                    (before.nar_hash, before.nar_size, before.references),
                )
            status = os.stat(second)
            self.assertEqual((status.st_mode & 0o7777, status.st_mtime), (0o444, 1))
            self.assertEqual(self.leftovers(), [])
            await client.close()

    async def reset(self) -> None:
        client = await self.client()
        await client.collect_garbage(2)
        await client.close()

    async def test_tree(self) -> None:
        """A tree with all kinds of nodes; S17: its files are shared with equal ones."""
        tree = Path(self.directory, "tree")
        (tree / "sub").mkdir(parents=True)
        for name in ("one", "sub/two"):
            (tree / name).write_bytes(b"twin" * 5000)
        (tree / "sub/run").write_text("#!")
        (tree / "sub/run").chmod(0o755)
        (tree / "link").symlink_to("sub/run")
        client = await self.client()
        path = await client.add_tree("tree", str(tree))
        archive = await self.export(client, path)
        await client.close()
        await self.reset()
        self.assertFalse(os.path.lexists(path))
        client = await self.client()
        self.assertEqual(list(await client.import_paths([archive])), [path])
        self.assertEqual(os.readlink(path + "/link"), "sub/run")
        self.assertEqual(os.stat(path + "/sub/run").st_mode & 0o777, 0o555)
        self.assertEqual(os.stat(path + "/one").st_nlink, 3)
        self.assertEqual(await self.export(client, path), archive)

    async def test_valid_already(self) -> None:
        """S25: what is there already is named all the same."""
        client = await self.client()
        path = await client.add_text("a", b"a", ())
        archive = await self.export(client, path)
        self.assertEqual(list(await client.import_paths([archive])), [path])
        self.assertEqual(self.leftovers(), [])

    async def test_deriver(self) -> None:
        """S26: a deriver that is unknown here is dropped."""
        path = self.path("made")
        deriver = self.path("made.drv")
        client = await self.client()
        archive = self.archive(path, nar_of_file(b"x"), deriver=deriver) + END
        self.assertEqual(list(await client.import_paths([archive])), [path])
        self.assertIsNone(await client.deriver(path))

    async def test_derivation(self) -> None:
        """A derivation is checked like one that is added."""
        client = await self.client()
        text = b'Derive([("out","/nowhere","","")],[],[],"x","/x",[],[("out","/nowhere")])'
        path = self.store.text_path("x.drv", hashlib.sha256(text).digest(), ())
        archive = self.archive(path, nar_of_file(text)) + END
        error = await self.fails(client.import_paths([archive]))
        self.assertNotEqual(error, "")
        self.assertFalse(await client.is_valid_path(path))
        self.assertEqual(self.leftovers(), [])
        with self.assertRaises(Exception):  # noqa: B017 - whatever the parser says
            derivation.parse(text, self.store, path)

    async def test_between_daemons(self) -> None:
        """Another store under the same name takes it, if it has the key."""
        client = await self.client()
        path = await client.add_text("a", b"a" * 10_000, ())
        archive = await self.export(client, path)
        await self.delete_all(client)
        self.assertFalse(os.path.lexists(path))
        self.assertEqual(list(await client.import_paths([archive])), [path])

    async def delete_all(self, client: Client) -> None:
        await client.collect_garbage(2)


class Exports(ArchiveCase):
    async def test_body(self) -> None:
        """S22: the bytes of an archive, and their hash."""
        client = await self.client()
        path = await client.add_text("hello.txt", b"Hello, store!\n", ())
        body = (await self.export(client, path, sign=False))[8:-16]
        expected = nar_of_file(b"Hello, store!\n") + encode_int(MAGIC)
        expected += encode_bytes(path.encode()) + encode_int(0) + encode_bytes(b"")
        self.assertEqual(body, expected)
        as_if = body.replace(
            encode_bytes(path.encode()),
            encode_bytes(b"/gnu/store/bjfjcd0iwaqp6ckwlrd6qim7hjaa5ngi-hello.txt"),
        )
        self.assertEqual(hashlib.sha256(as_if).hexdigest(), T1)

    async def test_changed(self) -> None:
        """A file that has been changed is not exported."""
        client = await self.client()
        path = await client.add_text("a", b"abc", ())
        os.chmod(path, 0o644)
        Path(path).write_text("abd")
        self.assertIn("changed", await self.fails(client.export_path(path, lambda _: None)))
        self.assertTrue(await client.is_valid_path(path))

    async def test_invalid(self) -> None:
        client = await self.client()
        error = await self.fails(client.export_path(self.path("none"), lambda _: None))
        self.assertIn("not valid", error)

    async def test_open_key(self) -> None:
        """S31: a secret key that others can read is refused; without signature all is well."""
        (self.configuration / "signing-key.sec").chmod(0o440)
        client = await self.client()
        path = await client.add_text("a", b"a", ())
        self.assertIn("0400", await self.fails(client.export_path(path, lambda _: None)))
        self.assertTrue(await self.export(client, path, sign=False))

    async def test_leaving(self) -> None:
        """A client that leaves in the middle of a large export costs nothing more."""
        large = Path(self.directory, "large")
        large.write_bytes(bytes(8 << 20))
        client = await self.client()
        path = await client.add_tree("large", str(large))
        exporting = client.export_path(path, lambda _: exporting.cancel())
        exporting.addErrback(lambda _: None)
        await exporting
        while self.daemon.service.daemon.sessions or path in open_names():
            await deferLater(reactor, 0)
        other = await self.client()
        await other.collect_garbage(3, [path])
        self.assertFalse(os.path.lexists(path))


class Refusals(ArchiveCase):
    """S24, N7: what is not as it must be leaves nothing, and the session goes on."""

    async def refuse(self, archive: bytes | Iterator[bytes], *words: str) -> None:
        client = await self.client()
        pieces = [archive] if isinstance(archive, bytes) else archive
        error = await self.fails(client.import_paths(pieces))
        for word in words:
            self.assertIn(word, error)
        self.assertFalse(await client.is_valid_path(self.path("x")))
        self.assertEqual(self.leftovers(), [])
        self.assertFalse(os.path.lexists(self.path("x")))
        await client.close()

    async def test_unsigned(self) -> None:
        nar = nar_of_file(b"x")
        await self.refuse(self.archive(self.path("x"), nar, signed=False), "lacks a signature")

    async def test_gone_after_it(self) -> None:
        """S24: so it is when the client leaves while what it sent is discarded."""
        begun: Deferred[None] = Deferred()
        go = threading.Event()
        discard = Import.discard

        def wait(importing: Import) -> None:
            reactor.callFromThread(begun.callback, None)
            go.wait(20)
            discard(importing)

        self.patch(Import, "discard", wait)
        client = await self.client()
        nar = nar_of_file(b"twin" * 4096)
        importing = client.import_paths([self.archive(self.path("x"), nar, signed=False)])
        await begun
        (session,) = self.daemon.service.daemon.sessions
        importing.cancel()
        await self.assertFailure(importing, CancelledError)
        while session.connection.fileno() >= 0:
            await deferLater(reactor, 0)
        await deferLater(reactor, 0)
        go.set()
        while self.daemon.service.daemon.sessions:
            await deferLater(reactor, 0)
        self.assertEqual(self.leftovers(), [])
        self.assertNotIn(f"{self.store.path}/.links", open_names())
        self.assertEqual(session.store.staging._taken, set())

    async def test_unauthorised(self) -> None:
        nar = nar_of_file(b"x")
        archive = self.archive(self.path("x"), nar, keys=self.stranger) + END
        await self.refuse(archive, "unauthorized public key")
        # A change of the list counts at once.
        both = [sexp.parse(golden(f"{kind}.acl"))[1] for kind in ("ecc", "rsa")]
        (self.configuration / "acl").write_bytes(sexp.pretty((b"acl", *both)))
        client = await self.client()
        self.assertEqual(list(await client.import_paths([archive])), [self.path("x")])

    async def test_tampered(self) -> None:
        archive = self.archive(self.path("x"), nar_of_file(b"original"))
        await self.refuse(archive.replace(b"original", b"tampered") + END, "corrupt")
        other = archive.replace(self.path("x").encode(), self.path("y").encode())
        await self.refuse(other + END, "corrupt")

    async def test_malformed(self) -> None:
        nar = nar_of_file(b"x")
        good = self.archive(self.path("x"), nar)
        await self.refuse(self.archive(self.path("x"), nar, magic=1) + END, "bad archive")
        await self.refuse(self.archive("/etc/passwd", nar) + END, "not in the store")
        for name in (".links", "trash", "x.lock", "short"):
            await self.refuse(self.archive(self.store.child(name), nar) + END)
        await self.refuse(b"\2" + good[1:], "bad archive")
        await self.refuse(encode_long(1) + b"\xff" * 16)
        await self.refuse(self.archive(self.path("x"), nar, ("/etc",)) + END, "not in the store")

    async def test_missing_reference(self) -> None:
        archive = self.archive(self.path("x"), nar_of_file(b"x"), (self.path("missing"),))
        await self.refuse(archive + END, "not valid")

    async def test_truncated(self) -> None:
        """N6, P30: an end at any place."""
        archive = self.archive(self.path("x"), nar_of_file(b"x")) + END
        for size in range(0, len(archive) - 8, 37):
            await self.refuse(archive[:size], "unexpected end of file")

    async def test_later_item(self) -> None:
        """Items before a wrong one stay."""
        first = self.archive(self.path("first"), nar_of_file(b"1"))
        wrong = self.archive(self.path("x"), nar_of_file(b"2"), signed=False)
        await self.refuse(first + wrong, "lacks a signature")
        client = await self.client()
        self.assertTrue(await client.is_valid_path(self.path("first")))

    async def test_hostile_names(self) -> None:
        """N8, N9: names that lead elsewhere never reach the file system."""
        canary = Path(self.directory, "canary")
        canary.mkdir()

        def entry(name: bytes, node: bytes) -> bytes:
            tokens = [b"entry", b"(", b"name", name, b"node"]
            return b"".join(map(encode_bytes, tokens)) + node + encode_bytes(b")")

        def tree(*entries: bytes) -> bytes:
            begin = [b"nix-archive-1", b"(", b"type", b"directory"]
            return b"".join(map(encode_bytes, begin)) + b"".join(entries) + encode_bytes(b")")

        link = b"".join(
            map(encode_bytes, [b"(", b"type", b"symlink", b"target", os.fsencode(canary), b")"])
        )
        file = nar_of_file(b"evil")[len(encode_bytes(b"nix-archive-1")) :]
        inner = tree(entry(b"evil", file))[len(encode_bytes(b"nix-archive-1")) :]
        for nar in (
            tree(entry(b"..", file)),
            tree(entry(b"../canary/evil", file)),
            tree(entry(b"", file)),
            tree(entry(b"a\0b", file)),
            tree(entry(b"d", link), entry(b"d", inner)),
            tree(entry(b"b", file), entry(b"a", file)),
        ):
            await self.refuse(self.archive(self.path("x"), nar) + END)
        self.assertEqual(list(canary.iterdir()), [])

    async def test_leaving(self) -> None:
        """A client that leaves in the middle leaves nothing behind."""
        large = nar_of_file(bytes(4 << 20))

        def pieces() -> Iterator[bytes]:
            yield encode_long(1) + large[: 2 << 20]
            importing.cancel()

        client = await self.client()
        importing = client.import_paths(pieces())
        importing.addErrback(lambda _: None)
        await importing
        await self.daemon.stop()
        self.assertEqual(self.leftovers(), [])


class OtherStore(ArchiveCase):
    async def test_memory_of_names(self) -> None:
        """Places for what arrives are used again."""
        client = await self.client()
        archives = [
            self.archive(self.path(f"i{number}"), nar_of_file(b"%d" % number))
            for number in range(60)
        ]
        imported = await client.import_paths([b"".join(archives) + END])
        self.assertEqual(len(imported), 60)
        self.assertEqual(await client.valid_paths(imported), tuple(sorted(imported)))
        self.assertEqual(self.leftovers(), [])
