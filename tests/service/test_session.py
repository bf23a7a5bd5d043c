"""Requests to a daemon over a socket, and what they answer."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

from twisted.logger import LogEvent, formatEvent, globalLogPublisher

from guixd.formats import operations as op
from guixd.formats.messages import Next
from guixd.formats.wire import encode_int, encode_string
from guixd.service.queries import BUILTIN_BUILDERS
from tests.service.world import DaemonCase, messages, set_options


class QueryTests(DaemonCase):
    options = {"substitute_urls": ("http://default",)}

    async def test_what_is_known(self) -> None:
        """P9, P11: what queries say of items, sorted and without duplicates."""
        client = await self.client()
        b = await client.add_text("b", b"text")
        a = await client.add_text("a", b"other")
        user = await client.add_text("user", b"x", [a, b])
        self.assertTrue(await client.is_valid_path(user))
        self.assertEqual(await client.references(user), tuple(sorted((a, b))))
        self.assertEqual(await client.referrers(a), (user,))
        self.assertEqual(await client.all_valid_paths(), tuple(sorted((a, b, user))))
        self.assertEqual(await client.valid_paths([b, a, b, self.path("x")]), tuple(sorted((a, b))))
        info = await client.path_info(b)
        self.assertEqual((info.deriver, info.references), (None, ()))
        self.assertEqual(info.nar_hash, await client.path_hash(b))
        self.assertIsNone(await client.deriver(a))
        self.assertEqual(await client.derivation_outputs(a), ())
        self.assertEqual(await client.derivation_output_names(a), ())

    async def test_invalid_path(self) -> None:
        """P9: some queries need a valid path, some do not; the connection goes on."""
        client = await self.client()
        path = self.path("nothing")
        self.assertFalse(await client.is_valid_path(path))
        self.assertEqual(await client.referrers(path), ())
        self.assertEqual(await client.valid_derivers(path), ())
        for query in (
            client.path_info,
            client.path_hash,
            client.references,
            client.deriver,
            client.derivation_outputs,
            client.derivation_output_names,
        ):
            self.assertIn("is not valid", await self.fails(query(path)))
        self.assertFalse(await client.is_valid_path(path))

    async def test_not_in_store(self) -> None:
        """P7: a path outside of the store ends the connection, except with op 1."""
        client = await self.raw(None, op.IsValidPath("/etc"), op.IsValidPath("/etc"))
        client.transport.write(encode_int(3) + encode_string("/etc"))
        _, *errors = messages(await client.closed)
        self.assertEqual(len(errors), 3)
        for error in errors:
            self.assertIn("is not in the store", error.text)

    async def test_hash_part(self) -> None:
        """P10: 32 bytes, or an error that leaves the connection."""
        client = await self.client()
        path = await client.add_text("x", b"y")
        self.assertEqual(await client.path_from_hash_part(path.hash_part), path)
        self.assertIsNone(await client.path_from_hash_part("z" * 32))
        self.assertIsNone(await client.path_from_hash_part("\u00e9" * 16))
        for wrong in "0" * 31, "\u00e9" * 32:
            self.assertIn("hash part", await self.fails(client.path_from_hash_part(wrong)))
        self.assertEqual(await client.path_from_hash_part(path.hash_part), path)

    async def test_nothing_to_substitute(self) -> None:
        client = await self.client()
        await client.set_options(set_options(("substitute-urls", "")))
        path = self.path("x")
        self.assertFalse(await client.has_substitutes(path))
        self.assertEqual(await client.substitutable_paths([path]), ())
        self.assertEqual(await client.substitutable_path_infos([path]), ())
        self.assertIsNone(await client.substitutable_path_info(path))

    async def test_builtins_and_urls(self) -> None:
        """P20: the builders that are built in, and where substitutes come from."""
        client = await self.client()
        self.assertEqual(await client.builtin_builders(), BUILTIN_BUILDERS)
        self.assertEqual(await client.substitute_urls(), ("http://default",))
        await client.set_options(set_options(("substitute-urls", "http://b http://a")))
        self.assertEqual(await client.substitute_urls(), ("http://b", "http://a"))
        await client.set_options(set_options(use_substitutes=False))
        await client.set_options(set_options(use_substitutes=True))
        self.assertEqual(await client.substitute_urls(), ())

    async def test_failed_paths(self) -> None:
        client = await self.client()
        self.daemon.service.daemon._store.database.add_failed([self.path("a"), self.path("b")])
        self.assertEqual(await client.failed_paths(), (self.path("a"), self.path("b")))
        await client.clear_failed_paths([self.path("a"), "nonsense"])
        self.assertEqual(await client.failed_paths(), (self.path("b"),))
        await client.clear_failed_paths(["*"])
        self.assertEqual(await client.failed_paths(), ())


class RootTests(DaemonCase):
    async def test_temporary(self) -> None:
        """Temporary roots, of invalid paths too, are in a file until the session ends."""
        client = await self.client()
        await client.add_temp_root(self.path("x"))
        directory = Path(self.directory, "var/temproots")
        contents = [file.read_bytes() for file in directory.iterdir()]
        self.assertIn(self.path("x").encode() + b"\0", contents)
        before = len(contents)
        await client.close()
        other = await self.client()
        await other.sync_with_gc()
        self.assertEqual(len(os.listdir(directory)), before - 1)

    async def test_null(self) -> None:
        """A null character would make two roots of one."""
        client = await self.client()
        self.assertIn("null", await self.fails(client.add_temp_root(self.path("a\0b"))))
        self.assertEqual(await client.all_valid_paths(), ())

    async def test_indirect(self) -> None:
        """A link to an item is a root once it is registered."""
        client = await self.client()
        path = await client.add_text("x", b"y")
        link = self.directory + "/result"
        os.symlink(path, link)
        await client.add_indirect_root(self.directory + "/a/../result")
        self.assertEqual(await client.find_roots(), ((link, path),))
        os.unlink(link)
        await client.set_options(set_options(verbosity=1))
        self.assertEqual(await client.find_roots(), ())
        self.assertIn(b"stale", b"".join(self.log))


class HandshakeTests(DaemonCase):
    tcp = True

    async def test_quiet(self) -> None:
        """P34: neither the handshake nor SetOptions of a quiet client logs anything."""
        client = await self.raw(None, set_options())
        client.transport.loseWriteConnection()
        data = await client.closed
        self.assertEqual(len(messages(data)), 2)
        self.assertFalse([m for m in messages(data) if isinstance(m, Next)])

    async def test_profile_directory(self) -> None:
        """The client's user gets a directory for profiles."""
        await self.client()
        name = pwd.getpwuid(os.getuid()).pw_name
        status = os.stat(f"{self.directory}/var/profiles/per-user/{name}")
        self.assertEqual((status.st_uid, stat.S_IMODE(status.st_mode)), (os.getuid(), 0o755))

    async def test_user_name(self) -> None:
        """P23: a client on TCP names its user; an unknown one is only mentioned."""
        client = await self.client(self.port)
        users = self.directory + "/var/profiles/per-user"
        name = pwd.getpwuid(os.getuid()).pw_name
        await client.set_options(set_options(("user-name", name)))
        self.assertEqual(os.stat(f"{users}/{name}").st_uid, os.getuid())
        logged: list[LogEvent] = []
        globalLogPublisher.addObserver(logged.append)
        self.addCleanup(globalLogPublisher.removeObserver, logged.append)
        pairs = ("user-name", "no-such-user"), ("user-name", "../evil")
        await client.set_options(set_options(*pairs, verbosity=1))
        self.assertEqual(os.listdir(users), [name])
        self.assertIn("no-such-user", "".join(map(formatEvent, logged)))
        self.assertEqual(self.log, [])

    async def test_bad_options(self) -> None:
        """P21: a setting of the wrong type ends the connection."""
        for name, value in (("build-max-jobs", "abc"), ("multiplexed-build-output", "1")):
            error = await self.refused(set_options((name, value)))
            self.assertIn(name, error.text)
        client = await self.client()
        await client.set_options(set_options(("build-max-jobs", "-1")))

    async def test_collection_by_tcp(self) -> None:
        """P19: refused before the arguments are read."""
        error = await self.refused(encode_int(op.CollectGarbage.opcode), endpoint=self.port)
        self.assertIn("not allowed", error.text)
