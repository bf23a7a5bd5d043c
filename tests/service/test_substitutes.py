"""Substitutes through the whole daemon (spec: substitutes §13)."""

from __future__ import annotations

import os
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.lanes import MOST_PER_SERVER
from guixd.build.servers import MOST_DISCOVERED, discovered
from guixd.formats.nar import nar_of_file
from guixd.formats.wire import encode_bytes
from tests.net.servers import Asked, Server, answer, unused_port
from tests.service.downloads import CONTENT
from tests.service.substitutes import SubstituteCase
from tests.service.world import set_options
from tests.store.holder import Holder
from tests.support import open_names, temporary_directory


class GoodServer(SubstituteCase):
    async def test_one(self) -> None:
        """U1, U20: installed with what was signed; the traces, and no others."""
        deriver = self.path("maker.drv").base
        path = self.offer("item", b"some text", deriver=deriver)
        client = await self.client(print_extended_build_trace="1")
        await client.build_paths([path])
        self.assertEqual(Path(path).read_bytes(), b"some text")
        info = await client.path_info(path)
        self.assertEqual(info.references, ())
        self.assertEqual(info.deriver, self.path("maker.drv"))
        status = os.stat(path)
        self.assertEqual((status.st_mode & 0o7777, status.st_mtime), (0o444, 1))
        url, size = f"{self.url}/nar/{path.base}", info.nar_size
        traces = [line for line in self.text().split("\n") if line.startswith("@ ")]
        self.assertEqual(
            traces,
            [
                f"@ substituter-started {path} substitute",
                f"@ download-started {path} {url} {size}",
                f"@ download-progress {path} {url} {size} {size}",
                f"@ download-succeeded {path} {url} {size}",
                f"@ substituter-succeeded {path}",
            ],
        )
        self.assertEqual(self.leftovers(), [])

    async def test_sizes(self) -> None:
        """U20: what the server sends counts, not what a narinfo said of its size."""
        path = self.offer("item", file_size=7)
        client = await self.client(print_extended_build_trace="1")
        self.assertEqual((await client.substitutable_path_infos([path]))[0].download_size, 7)
        await client.build_paths([path])
        size = (await client.path_info(path)).nar_size
        self.assertIn(
            f"@ download-progress {path} {self.url}/nar/{path.base} {size} {size}\n", self.text()
        )

    async def test_references_first(self) -> None:
        """U17: what an item refers to comes before it."""
        low = self.offer("low")
        middle = self.offer("middle", b"m", (low,), compression="gzip")
        top = self.offer("top", b"t", (middle, low))
        client = await self.client()
        await client.build_paths([top])
        self.assertEqual(set(await client.valid_paths([low, middle, top])), {low, middle, top})
        self.assertEqual(set(await client.references(top)), {low, middle})
        self.assertEqual(self.asked(f"/nar/{low.base}"), 1)

    async def test_questions(self) -> None:
        """U24: what clients can ask, and nothing without substitutes."""
        low = self.offer("low")
        top = self.offer("top", b"t", (low,))
        none = self.path("none")
        client = await self.client()
        self.assertTrue(await client.has_substitutes(top))
        self.assertFalse(await client.has_substitutes(none))
        self.assertEqual(await client.substitutable_paths([none, top]), (top,))
        info = await client.substitutable_path_info(top)
        assert info is not None
        self.assertEqual(info.references, (low,))
        self.assertEqual(await client.substitutable_path_info(f"{top[1:]}/."), info)
        text = await self.fails(client.substitutable_path_info("x"))
        self.assertIn("'/x' is not in the store", text)
        infos = await client.substitutable_path_infos([top, none, low])
        self.assertEqual([each.path for each in infos], sorted([low, top]))
        self.assertEqual(
            infos[0].nar_size, len(nar_of_file(b"t" if infos[0].path == top else b"content"))
        )
        self.assertEqual(self.asked(".narinfo"), 3)  # nothing is asked twice
        await client.set_options(set_options(use_substitutes=False))
        self.assertEqual(await client.substitutable_paths([top]), ())
        self.assertIsNone(await client.substitutable_path_info("x"))
        self.assertFalse(await client.has_substitutes(top))

    async def test_ensure(self) -> None:
        """B5: an item that there is, and one that there is not."""
        path = self.offer("item")
        client = await self.client()
        await client.ensure_path(path)
        self.assertTrue(await client.is_valid_path(path))
        text = await self.fails(client.ensure_path(self.path("none")))
        self.assertIn("no substitute", text)
        # A build of what nobody has succeeds, and the path is not valid.
        await client.build_paths([self.path("none")])
        self.assertFalse(await client.is_valid_path(self.path("none")))

    async def test_derivation(self) -> None:
        """U17, D20: outputs are downloaded instead of being made, unless that is not allowed."""
        client = await self.client()
        drv, out = await self.derive(client, f'"{self.server.url("/source")}"')
        self.offer("", CONTENT, path=out)
        self.answers["/source"] = answer(CONTENT)
        await client.build_paths([drv])
        self.assertEqual((self.asked("/source"), self.asked(out.base)), (0, 1))
        drv, out = await self.derive(
            client, f'"{self.server.url("/source")}"', name="here", allowSubstitutes="0"
        )
        self.offer("", CONTENT, path=out)
        await client.build_paths([drv])
        self.assertEqual((self.asked("/source"), self.asked(out.base)), (1, 0))

    async def test_derivation_itself(self) -> None:
        """A derivation that is not there is downloaded, and then built."""
        client = await self.client()
        drv, out = await self.derive(client, f'"{self.server.url("/source")}"')
        text = Path(drv).read_bytes()
        await client.collect_garbage(3, [drv])
        self.offer("", text, path=drv)
        self.answers["/source"] = answer(CONTENT)
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)

    async def test_ready_in_time(self) -> None:
        """U21: what asks servers begins as soon as a client wants substitutes, and never else."""
        daemon = self.daemon.service.daemon
        await self.client(urls="")
        await deferLater(reactor, 0)
        self.assertIsNone(daemon._fetcher)
        client = await self.client()
        await deferLater(reactor, 0)
        number = daemon.fetcher.pid
        self.assertGreater(number, 0)
        self.assertTrue(await client.has_substitutes(self.offer("item")))
        self.assertEqual(daemon.fetcher.pid, number)

    async def test_shared(self) -> None:
        """U21: two clients, one download."""
        path = self.offer("item")
        held: list[Asked] = []
        begun: Deferred[None] = Deferred()

        def hold(connection: Asked, _request: str) -> None:
            held.append(connection)
            begun.callback(None)

        self.answers[f"/nar/{path.base}"] = hold
        first, second = await self.client(), await self.client()
        building = [first.build_paths([path]), second.build_paths([path])]
        await begun
        held[0].send(answer(nar_of_file(b"content")))
        await gatherResults(building)
        self.assertEqual(self.asked("/nar/"), 1)
        self.assertTrue(await second.is_valid_path(path))

    async def test_several_at_once(self) -> None:
        """U22: downloads are not bound to the number of builds."""
        paths = [self.offer(f"item{number}") for number in range(4)]
        held: list[tuple[Asked, str]] = []
        all_begun: Deferred[None] = Deferred()

        def hold(connection: Asked, request: str) -> None:
            held.append((connection, request))
            if len(held) == len(paths):
                all_begun.callback(None)

        for path in paths:
            self.answers[f"/nar/{path.base}"] = hold
        client = await self.client(build_max_jobs="1")
        building = client.build_paths(paths)
        await all_begun
        for connection, _ in held:
            connection.send(answer(nar_of_file(b"content")))
        await building
        self.assertEqual(set(await client.valid_paths(paths)), set(paths))

    async def test_foreign_locks(self) -> None:
        """U28: downloads that wait for another process's locks keep no others from going on."""
        holder = Holder(self)
        all_asked: Deferred[None] = Deferred()

        def lock(connection: Asked, request: str) -> None:
            holder.ask("write", self.store.path + request.split()[1].removeprefix("/nar") + ".lock")
            connection.send(answer(nar_of_file(b"content")))
            if self.asked("/nar/") == len(paths):
                all_asked.callback(None)

        paths = [self.offer(f"item{number}") for number in range(MOST_PER_SERVER)]
        for path in paths:
            self.answers[f"/nar/{path.base}"] = lock
        other, client = await self.client(), await self.client()
        building = client.build_paths(paths)
        await all_asked
        await other.build_paths([self.offer("other")])
        self.assertFalse(building.called)
        holder.kill()
        await building
        self.assertEqual(self.text().count("waiting for the lock on"), len(paths))

    async def test_equal_files(self) -> None:
        """U27: files are shared with equal ones while they come, or not; nothing stays open."""
        for name, shares in (("shared", "true"), ("alone", "false")):
            tree = self.tree(b"twin" * 4096)
            path = self.offer(name, nar=tree)
            client = await self.client(auto_optimise_store=shares)
            await client.build_paths([path])
            links = os.stat(path + "/one").st_nlink
            self.assertEqual(links, 3 if shares == "true" else 1)
            self.assertNotIn(f"{self.store.path}/.links", open_names())
            await client.close()

    def tree(self, content: bytes) -> bytes:
        """Return the NAR of a directory with two equal files."""
        head = len(encode_bytes(b"nix-archive-1"))
        node = nar_of_file(content)[head:]
        parts = [encode_bytes(b"nix-archive-1")]
        parts += map(encode_bytes, (b"(", b"type", b"directory"))
        for name in (b"one", b"two"):
            parts += map(encode_bytes, (b"entry", b"(", b"name", name, b"node"))
            parts += [node, encode_bytes(b")")]
        return b"".join([*parts, encode_bytes(b")")])

    async def test_repair(self) -> None:
        """U19: damaged contents are replaced, on demand and by verifying."""
        path = self.offer("item", b"as it was")
        client = await self.client()
        await client.build_paths([path])

        def damage() -> None:
            os.chmod(path, 0o644)
            Path(path).write_bytes(b"damaged!!")

        damage()
        await client.build_paths([path], 1)
        self.assertEqual(Path(path).read_bytes(), b"as it was")
        damage()
        self.assertFalse(await client.verify_store(check_contents=True, repair=True))
        self.assertEqual(Path(path).read_bytes(), b"as it was")
        self.assertEqual(os.stat(path).st_mode & 0o7777, 0o444)
        self.assertEqual(self.leftovers(), [])
        self.answers.clear()
        damage()
        await client.close()
        client = await self.client(urls=f"http://127.0.0.1:{unused_port()}")
        self.assertTrue(await client.verify_store(check_contents=True, repair=True))

    async def test_repair_with_references(self) -> None:
        """U17, U19: what the new contents refer to comes first; without it nothing is replaced."""
        client = await self.client()
        low = self.offer("low")
        middle = self.offer("middle", b"m", (low,))
        top = self.offer("top", b"t", (middle,))
        await client.build_paths([top], 1)
        self.assertEqual(await client.references(top), (middle,))
        self.assertEqual(await client.references(middle), (low,))
        none = self.path("none")
        text = await self.fails(client.build_paths([self.offer("alone", b"a", (none,))], 1))
        self.assertIn("refers to is not valid", text)
        self.assertNothing(self.path("alone"))
        self.answers[f"/nar/{self.offer('broken').base}"] = answer(b"", status="500 No")
        text = await self.fails(
            client.build_paths([self.offer("upper", b"u", (self.path("broken"),))], 1)
        )
        self.assertIn("500 No", text)
        self.assertNothing(self.path("upper"))


class WhoCounts(SubstituteCase):
    """Whose word counts."""

    async def refused(self, path: object) -> None:
        client = await self.client()
        self.assertEqual(await client.substitutable_paths([str(path)]), ())
        await client.build_paths([str(path)])
        self.assertFalse(await client.is_valid_path(str(path)))
        self.assertEqual(self.asked("/nar/"), 0)

    async def test_unsigned(self) -> None:
        """U2, U3: no signature, a stranger's, one of another version, or about less."""
        await self.refused(self.offer("unsigned", keys=None))
        await self.refused(self.offer("stranger", keys=self.stranger))
        await self.refused(self.offer("version", version="2"))
        path = self.offer("less")
        said = self.answers[f"/{path.hash_part}.narinfo"]
        assert isinstance(said, bytes)
        body = said.partition(b"\r\n\r\n")[2]
        lines = body.split(b"\n")
        moved = b"\n".join([*(ln for ln in lines if not ln.startswith(b"NarHash")), lines[1], b""])
        self.answers[f"/{path.hash_part}.narinfo"] = answer(moved)
        await self.refused(path)

    async def test_changed(self) -> None:
        """U4: the places may change, what is signed may not."""
        path = self.offer("item")
        name = f"/{path.hash_part}.narinfo"
        said = self.answers[name]
        assert isinstance(said, bytes)
        body = said.partition(b"\r\n\r\n")[2]
        self.answers["/elsewhere"] = self.answers.pop(f"/nar/{path.base}")
        self.answers[name] = answer(body.replace(b"nar/" + path.base.encode(), b"elsewhere"))
        client = await self.client()
        await client.build_paths([path])
        self.assertTrue(await client.is_valid_path(path))
        other = self.offer("other")
        said = self.answers[f"/{other.hash_part}.narinfo"]
        assert isinstance(said, bytes)
        body = said.partition(b"\r\n\r\n")[2].replace(b"NarSize: 1", b"NarSize: 2")
        self.answers[f"/{other.hash_part}.narinfo"] = answer(body)
        self.assertEqual(await client.substitutable_paths([other]), ())

    async def test_two_servers(self) -> None:
        """U5: an unsigned server may have what a signed one vouches for."""
        path = self.offer("item", keys=None)
        nar = nar_of_file(b"content")
        vouching = Server(
            self,
            lambda connection, request: connection.send(
                answer(self.narinfo(path, nar)) if "narinfo" in request else answer(b"", "404 No")
            ),
        )
        urls = f"{self.url} {vouching.url('')}"
        client = await self.client(urls=urls)
        await client.build_paths([path])
        self.assertTrue(await client.is_valid_path(path))
        self.assertEqual(self.asked("/nar/"), 1)

    async def test_another_item(self) -> None:
        """U8: what is signed about another item is not accepted in its place."""
        good = self.offer("good", b"evil")
        wanted = self.path("wanted")
        self.answers[f"/{wanted.hash_part}.narinfo"] = self.answers[f"/{good.hash_part}.narinfo"]
        await self.refused(wanted)
        self.assertNothing(wanted)

    async def test_list_changes(self) -> None:
        """U29: a change of the list of keys counts at once."""
        acl = Path(self.directory, "etc/acl")
        text = acl.read_bytes()
        acl.write_text("(acl)")
        path = self.offer("item")
        client = await self.client()
        self.assertFalse(await client.has_substitutes(path))
        acl.write_bytes(text)
        self.assertTrue(await client.has_substitutes(path))

    async def test_urls(self) -> None:
        """U16: a client's list replaces the daemon's."""
        path = self.offer("item")
        client = await self.client(urls="")
        self.assertFalse(await client.has_substitutes(path))
        self.assertEqual(self.server.requests, [])

    async def test_discovered(self) -> None:
        """U25: servers in the list are asked first, and also if the client names none."""
        path, other = self.offer("item"), self.offer("other")
        published = Path(self.directory, "var/discover/publish")
        published.parent.mkdir()
        published.write_text(f"{self.url}\nnonsense\nfile:///etc\n\x00\n{self.url}\n")
        client = await self.client(urls="", discover="true")
        self.assertTrue(await client.has_substitutes(path))
        await client.build_paths([path])
        self.assertEqual(Path(path).read_bytes(), b"content")
        self.assertEqual(self.asked(".narinfo"), 1)
        client = await self.client(urls="", discover="false")
        self.assertFalse(await client.has_substitutes(other))
        published.unlink()
        client = await self.client(discover="true")
        self.assertTrue(await client.has_substitutes(other))


class DiscoveredTests(SynchronousTestCase):
    def test_many(self) -> None:
        """U25: at most 50 servers are used, other ones each time."""
        state = temporary_directory(self)
        self.assertEqual(discovered(state), ())
        os.mkdir(state + "/discover")
        urls = [f"http://192.0.2.{number}:8080" for number in range(200)]
        Path(state, "discover/publish").write_text("\n".join(urls))
        found = [discovered(state) for _ in range(4)]
        self.assertEqual([len(set(each) & set(urls)) for each in found], [MOST_DISCOVERED] * 4)
        self.assertGreater(len(set(found)), 1)


class Trouble(SubstituteCase):
    """Servers that do not give what they promised."""

    async def fails_to(self, path: object) -> str:
        """Build PATH, which fails; return all that the client is told."""
        client = await self.client()
        error = await self.fails(client.build_paths([str(path)]))
        self.assertFalse(await client.is_valid_path(str(path)))
        text = self.text()
        self.assertIn(f"@ substituter-failed {path} ", text)
        return text + error

    async def test_wrong_contents(self) -> None:
        """U10: another archive of the same size; the next attempt works."""
        path = self.offer("item", b"right")
        self.answers[f"/nar/{path.base}"] = answer(nar_of_file(b"wrong"))
        text = await self.fails_to(path)
        self.assertIn(f"@ hash-mismatch {path} sha256 ", text)
        self.assertNotIn("--fallback", text)  # which would not help
        self.assertNothing(path)
        self.answers[f"/nar/{path.base}"] = answer(nar_of_file(b"right"))
        client = await self.client()
        await client.build_paths([path])
        self.assertEqual(Path(path).read_bytes(), b"right")

    async def test_wrong_size(self) -> None:
        """U30: more or less than the signed size."""
        for name, size in ("bigger", 1000), ("smaller", 120):
            path = self.offer(name, b"x" * 40, size=size)
            await self.fails_to(path)
            self.assertNothing(path)

    async def test_hostile_archives(self) -> None:
        """U9: names that lead elsewhere; nothing outside is touched."""
        canary = Path(self.directory, "canary")
        canary.mkdir()

        def tokens(*words: bytes) -> bytes:
            return b"".join(map(encode_bytes, words))

        def entry(name: bytes, node: bytes) -> bytes:
            return tokens(b"entry", b"(", b"name", name, b"node") + node + tokens(b")")

        def tree(*entries: bytes) -> bytes:
            return tokens(b"(", b"type", b"directory") + b"".join(entries) + tokens(b")")

        file = nar_of_file(b"evil")[len(tokens(b"nix-archive-1")) :]
        link = tokens(b"(", b"type", b"symlink", b"target", os.fsencode(canary), b")")
        deep = tree()
        for _ in range(2000):
            deep = tree(entry(b"d", deep)) if len(deep) < 200_000 else deep
        for number, node in enumerate(
            (
                tree(entry(b"..", file)),
                tree(entry(b"../canary/evil", file)),
                tree(entry(b"d", link), entry(b"d", tree(entry(b"evil", file)))),
                tree(entry(b"b", file), entry(b"a", file)),
                tree(entry(b"a", file), entry(b"a", file)),
                deep,
            )
        ):
            path = self.offer(f"hostile{number}", nar=tokens(b"nix-archive-1") + node)
            await self.fails_to(path)
            self.assertNothing(path)
        self.assertEqual(list(canary.iterdir()), [])

    async def test_broken_transfers(self) -> None:
        """U11, U12: cut short, reset, not there; nothing is left."""
        for name, response in (
            ("short", answer(b"abc", length=10_000)),
            ("missing", answer(b"", status="404 Not Found")),
        ):
            path = self.offer(name)

            def broken(connection: Asked, _request: str, data: bytes = response) -> None:
                connection.send(data)
                connection.close()

            self.answers[f"/nar/{path.base}"] = broken
            await self.fails_to(path)
            self.assertNothing(path)
        path = self.offer("reset")
        self.answers[f"/nar/{path.base}"] = lambda connection, _request: connection.reset()
        await self.fails_to(path)
        self.assertNothing(path)

    async def test_next_server(self) -> None:
        """U12: another server has what the first one has lost."""
        path = self.offer("item")
        nar = nar_of_file(b"content")
        other = Server(
            self,
            lambda connection, request: connection.send(
                answer(self.narinfo(path, nar) if "narinfo" in request else nar)
            ),
        )
        self.answers[f"/nar/{path.base}"] = answer(b"", status="404 Not Found")
        client = await self.client(urls=f"{self.url} {other.url('')}")
        await client.build_paths([path])
        self.assertTrue(await client.is_valid_path(path))

    async def test_fallback(self) -> None:
        """U18, B33: with it, what cannot be downloaded is built."""
        client = await self.client()
        drv, out = await self.derive(client, f'"{self.server.url("/source")}"')
        self.answers["/source"] = answer(CONTENT)
        self.offer("", CONTENT, path=out)
        self.answers[f"/nar/{out.base}"] = answer(b"", status="404 Not Found")
        text = await self.fails(client.build_paths([drv]))
        self.assertIn("--fallback", text)
        self.assertEqual(self.asked("/source"), 0)
        await client.set_options(set_options(("substitute-urls", self.url), try_fallback=True))
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)

    async def test_fallback_at_once(self) -> None:
        """U18: it is built while another download goes on."""
        client = await self.client()
        drv, out = await self.derive(client, f'"{self.server.url("/source")}"')
        self.offer("", CONTENT, path=out)
        self.answers[f"/nar/{out.base}"] = answer(b"", status="404 Not Found")
        other = self.offer("other")
        asked: dict[str, Deferred[Asked]] = {
            name: Deferred() for name in (f"/nar/{other.base}", "/source")
        }
        for name, waiting in asked.items():
            self.answers[name] = lambda connection, _, waiting=waiting: waiting.callback(connection)
        await client.set_options(set_options(("substitute-urls", self.url), try_fallback=True))
        building = client.build_paths([other, drv])
        held, source = [await waiting for waiting in asked.values()]
        source.send(answer(CONTENT))
        held.send(answer(nar_of_file(b"content")))
        await building
        self.assertEqual(Path(out).read_bytes(), CONTENT)
        self.assertTrue(await client.is_valid_path(other))

    async def test_incomplete_closure(self) -> None:
        """U17: without all that it refers to, an item is not downloaded but built."""
        client = await self.client()
        drv, out = await self.derive(client, f'"{self.server.url("/source")}"')
        self.answers["/source"] = answer(CONTENT)
        self.offer("", CONTENT, (self.path("missing"),), path=out)
        await client.build_paths([drv])
        self.assertEqual((self.asked("/source"), self.asked(f"/nar/{out.base}")), (1, 0))
        alone = self.offer("alone", b"a", (self.path("missing"),))
        await client.build_paths([alone])
        self.assertFalse(await client.is_valid_path(alone))

    async def test_nobody_there(self) -> None:
        """A server that cannot be reached is named once, and builds go on without it."""
        client = await self.client(urls=f"http://127.0.0.1:{unused_port()}")
        drv, out = await self.derive(client, f'"{self.server.url("/source")}"')
        self.answers["/source"] = answer(CONTENT)
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)

    async def test_leaving(self) -> None:
        """U28: when the client leaves, the download ends and nothing is left."""
        path = self.offer("item")
        begun: Deferred[Asked] = Deferred()

        def hold(connection: Asked, _request: str) -> None:
            connection.send(answer(nar_of_file(b"content")[:50], length=10_000))
            begun.callback(connection)

        self.answers[f"/nar/{path.base}"] = hold
        client = await self.client()
        building = client.build_paths([path])
        building.addErrback(lambda _: None)
        connection = await begun
        building.cancel()
        await connection.closed
        while self.daemon.service.daemon.sessions or self.leftovers():
            await deferLater(reactor, 0)
        self.assertFalse(os.path.lexists(path))

    async def test_schemes(self) -> None:
        """U23: a server on the web cannot make the daemon read files of this machine."""
        secret = Path(self.directory, "secret")
        secret.write_bytes(nar_of_file(b"content"))
        path = self.offer("item", url=f"file://{secret}")
        client = await self.client()
        self.assertFalse(await client.has_substitutes(path))
        text = await self.fails(client.ensure_path(path))
        self.assertIn("no substitute", text)
        self.assertNothing(path)


class Files(SubstituteCase):
    async def test_directory(self) -> None:
        """U23: a directory as the server."""
        path = self.path("item")
        nar = nar_of_file(b"content")
        directory = Path(self.directory, "files/nar")
        directory.mkdir(parents=True)
        (directory / path.base).write_bytes(nar)
        (directory.parent / f"{path.hash_part}.narinfo").write_bytes(self.narinfo(path, nar))
        for url in (f"file://{directory.parent}", str(directory.parent)):
            client = await self.client(urls=url)
            await client.build_paths([path])
            self.assertTrue(await client.is_valid_path(path))
            await client.collect_garbage(3, [path])
            await client.close()
