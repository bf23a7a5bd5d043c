"""`builtin:download` through the whole daemon (spec: downloads §9)."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

from guixd.build import download
from guixd.build.downloadinputs import LARGEST_VALUE
from guixd.build.request import BuildMode
from guixd.formats.hashes import to_base32
from tests.net.servers import Asked, Server, always, answer, unused_port
from tests.service.downloads import CONTENT, DownloadCase, quoted
from tests.service.world import set_options


class DownloadTest(DownloadCase):
    async def test_a_file(self) -> None:
        """W2, W14, W24: a string; no traces unless asked for; the log names the attempt."""
        server = Server(self, always(answer(CONTENT)))
        client = await self.client()
        drv, out = await self.derive(client, f'"{server.url()}"')
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)
        self.assertEqual(os.stat(out).st_mode & 0o7777, 0o444)
        info = await client.path_info(out)
        self.assertEqual(info.deriver, drv)
        (log,) = Path(self.directory, "log").rglob("*.gz")
        text = gzip.decompress(log.read_bytes()).decode()
        self.assertIn(f"starting download of {out}\nfrom {server.url()}\n", text)
        self.assertNotIn("@ download", text + b"".join(self.log).decode())

    async def test_url_lists_and_characters(self) -> None:
        """W2, W8: the first ones fail."""

        def script(connection: Asked, request: str) -> None:
            if "/good" in request:
                connection.send(answer(CONTENT))
            elif "/reset" in request:
                connection.reset()
            elif "/short" in request:
                connection.send(answer(b"wha", length=100))
                connection.close()
            else:
                connection.send(answer(b"no", status="404 Not Found"))

        server = Server(self, script)
        client = await self.client()
        paths = ("/missing", "/reset", "/short", r"/good\x2dü")
        refused = f"http://127.0.0.1:{unused_port()}/"
        urls = (refused, "gopher://example.org/", *(server.url(path) for path in paths))
        drv, out = await self.derive(client, quoted(*urls))
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)
        self.assertIn("GET /good-%C3%BC HTTP/1.1", server.requests[-1])

    async def test_all_fail(self) -> None:
        """W8: status 1 and no output."""
        server = Server(self, always(answer(b"no", status="404 Not Found")))
        client = await self.client()
        drv, out = await self.derive(client, quoted(server.url("/a"), server.url("/b")))
        status, text = await self.failure(client, drv)
        self.assertEqual(status, 1)
        self.assertIn("404 Not Found", text)
        self.assertEqual(len(server.requests), 2)
        self.assertFalse(os.path.exists(out))

    async def test_too_large(self) -> None:
        """W8: what would fill the disk is not even begun."""
        server = Server(self, always(answer(CONTENT, length=1 << 49)))
        client = await self.client()
        drv, _ = await self.derive(client, f'"{server.url()}"')
        status, text = await self.failure(client, drv)
        self.assertEqual(status, 1)
        self.assertIn("more than the disk has room for", text)
        await server.connections[0].closed

    async def test_what_is_refused(self) -> None:
        """W3, W6: before any request."""
        server = Server(self, always(answer(CONTENT)))
        client = await self.client()
        for url in (
            '"file:///etc/passwd"',
            '"file://me:hidden@x/etc/passwd"',
            '"/etc/passwd"',
            '"x"',
            quoted(server.url(), "file:///etc/passwd"),
            "",
            "()",
            "(a b)",
            "#.(exit)",
            "5",
            quoted(server.url(), server.url("/" + "x" * LARGEST_VALUE)),
        ):
            drv, _ = await self.derive(client, url)
            status, text = await self.failure(client, drv)
            self.assertEqual(status, 1, text)
            self.assertNotIn("hidden", text)
        drv, _ = await self.derive(client, f'"{server.url()}"', fixed=False)
        status, text = await self.failure(client, drv)
        self.assertEqual(status, 100, text)
        for name, fixed, status in (("a", False, 100), ("b", True, 1)):  # W1
            drv, _ = await self.derive(client, "x", name=name, builder="builtin:nope", fixed=fixed)
            self.assertEqual((await self.failure(client, drv))[0], status)
        self.assertEqual(server.requests, [])

    async def test_executables(self) -> None:
        """W7"""
        server = Server(self, always(answer(CONTENT)))
        client = await self.client()
        drv, out = await self.derive(client, f'"{server.url()}"', executable=True)
        await client.build_paths([drv])
        self.assertEqual(os.stat(out).st_mode & 0o7777, 0o555)

    async def test_wrong_hashes(self) -> None:
        """W9: the next mirror is tried; if none has it the last one is told of."""

        def script(connection: Asked, request: str) -> None:
            connection.send(answer(CONTENT if "/good" in request else request[:8].encode()))

        server = Server(self, script)
        client = await self.client()
        await client.set_options(set_options())
        drv, out = await self.derive(client, quoted(server.url("/bad"), server.url("/good")))
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)
        drv, out = await self.derive(client, quoted(server.url("/a"), server.url("/b")), name="x")
        status, text = await self.failure(client, drv)
        expected = to_base32(hashlib.sha256(CONTENT).digest())
        actual = to_base32(hashlib.sha256(b"GET /b H").digest())
        self.assertIn(f"@ hash-mismatch {out} sha256 {expected} {actual}\n", text)
        self.assertEqual(status, 1)
        self.assertFalse(os.path.exists(out))

    async def test_traces(self) -> None:
        """W14: exact, and framed for clients that want that."""
        server = Server(self, always(answer(CONTENT)))
        client = await self.client()
        url = server.url(user="me:secret@")
        shown = server.url(user="me:***@")
        pairs = (("print-extended-build-trace", "1"), ("multiplexed-build-output", "true"))
        await client.set_options(set_options(*pairs))
        drv, out = await self.derive(client, f'"{url}"')
        self.log.clear()
        await client.build_paths([drv])
        text = b"".join(self.log).decode()
        size = len(CONTENT)
        for line in (
            f"@ download-started {out} {shown} {size}\n",
            f"@ download-progress {out} {shown} {size} {size}\n",
            f"@ download-succeeded {out} {shown} {size}\n\n",
        ):
            self.assertIn(line, text)
        started = next(line for line in text.splitlines() if line.startswith("@ build-started"))
        number = started.split()[-1]
        self.assertIn(f"@ build-log {number} ", text)
        self.assertNotIn("secret", text)
        self.assertIn("Authorization: Basic bWU6c2VjcmV0", server.requests[0])  # W11

    async def test_checking(self) -> None:
        """W15: it is downloaded again, and compared; the output stays."""
        server = Server(self, always(answer(CONTENT)))
        client = await self.client()
        drv, out = await self.derive(client, f'"{server.url()}"')
        await client.build_paths([drv])
        before = os.stat(out)
        await client.build_paths([drv], BuildMode.CHECK)
        self.assertEqual(len(server.requests), 2)
        server.script = always(answer(b"other"))
        _, text = await self.failure(client, drv, BuildMode.CHECK)
        self.assertIn("hash", text)
        self.assertEqual(os.stat(out).st_ino, before.st_ino)
        self.assertEqual(Path(out).read_bytes(), CONTENT)


class SharingTest(DownloadCase):
    options = {"max_jobs": 0}

    async def test_two_clients(self) -> None:
        """W23, W25: one download for both, even with no jobs."""
        server = Server(self, lambda connection, _: None)
        one, two = await self.client(), await self.client()
        drv, _ = await self.derive(one, f'"{server.url()}"')
        first = one.build_paths([drv])
        second = two.build_paths([drv])
        connection = await server.arrivals.get()
        connection.send(answer(CONTENT))
        await first
        await second
        self.assertEqual(len(server.requests), 1)

    async def test_leaving(self) -> None:
        """W21: who leaves ends the download, and nothing is left."""
        server = Server(self, always(answer(b"wha", length=100)))
        client = await self.client()
        drv, _out = await self.derive(client, f'"{server.url()}"')
        client.build_paths([drv]).addErrback(lambda failure: None)
        await server.arrivals.get()
        await client.close()
        await server.connections[0].closed
        await self.daemon.stop()
        self.assertEqual(os.listdir(self.directory + "/tmp"), [])
        left = {name for name in os.listdir(self.store.path) if not name.endswith(".lock")}
        self.assertEqual(left, {".links", drv.base})

    async def test_silence(self) -> None:
        """W21: a server that says nothing breaks the client's limit."""
        server = Server(self, always(answer(b"wha", length=100)))
        client = await self.client()
        await client.set_options(set_options(("build-max-silent-time", "1")))
        drv, _ = await self.derive(client, f'"{server.url()}"')
        status, text = await self.failure(client, drv)
        self.assertEqual(status, 101, text)


class MirrorsTest(DownloadCase):
    async def test_mirrors(self) -> None:
        """W4: slashes, several, and kinds that are not known."""
        server = Server(
            self,
            lambda connection, request: connection.send(
                answer(CONTENT) if request.startswith("GET /good/d/f ") else answer(status="404 No")
            ),
        )
        client = await self.client()
        text = f"((gnu {server.url('/bad/')!r} {server.url('/good')!r}) (other.org))".replace(
            "'", '"'
        )
        mirrors = await client.add_text("mirrors", text.encode())
        drv, _ = await self.derive(client, '"mirror://gnu/d/f"', mirrors=mirrors, sources=[mirrors])
        await client.build_paths([drv])
        self.assertEqual([r.split()[1] for r in server.requests], ["/bad/d/f", "/good/d/f"])
        for url in ('"mirror://unknown/x"', '"mirror://other.org/x"'):
            drv, _out = await self.derive(
                client,
                url,
                name="x",
                mirrors=mirrors,
                sources=[mirrors],
                download_methods="(upstream)",
            )
            self.assertEqual((await self.failure(client, drv))[0], 1)

    async def test_lists_elsewhere(self) -> None:
        """W5: outside the store, or linked out of it."""
        server = Server(self, always(answer(CONTENT)))
        client = await self.client()
        outside = self.directory + "/outside"
        Path(outside).write_text("()")
        os.symlink(outside, self.directory + "/link")
        link = await client.add_tree("link", self.directory + "/link")
        item = await client.add_text("text", b"()")
        for name in ("mirrors", "content_addressed_mirrors", "disarchive_mirrors"):
            for file in (outside, "/etc/passwd", link, f"{item}/..", self.store.path + "/nothing"):
                drv, _ = await self.derive(client, f'"{server.url()}"', **{name: file})
                self.assertEqual((await self.failure(client, drv))[0], 1, (name, file))
        self.assertEqual(server.requests, [])

    async def test_internet_archive(self) -> None:
        """W17: only for what is on the Web, and without passwords, when all else has failed."""

        def script(connection: Asked, request: str) -> None:
            good = request.startswith("GET /web/20260101000000/")
            connection.send(answer(CONTENT) if good else answer(status="404 No"))

        server = Server(self, script)
        self.patch(download, "ARCHIVE", server.url("/web/20260101000000/"))
        client = await self.client()
        urls = quoted(server.url("/first", user="me:secret@"), server.url("/second"))
        drv, out = await self.derive(client, urls)
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)
        asked = [request.split()[1] for request in server.requests]
        self.assertEqual(asked[:2], ["/first", "/second"])
        self.assertEqual(asked[2:], [f"/web/20260101000000/{server.url('/first')}"])
        ftp = f"ftp://127.0.0.1:{unused_port()}/x"
        for number, (url, methods) in enumerate(
            ((server.url("/x"), "(upstream)"), (ftp, "(upstream internet-archive)"))
        ):
            drv, _ = await self.derive(
                client, quoted(url), name=f"n{number}", download_methods=methods
            )
            self.assertEqual((await self.failure(client, drv))[0], 1)
        drv, _ = await self.derive(
            client, quoted(server.url("/y")), name="only", download_methods="(internet-archive)"
        )
        await client.build_paths([drv])
        self.assertEqual(sum("/web/" in request for request in server.requests), 2)

    async def content_addressed(self, text: str, **variables: str) -> tuple[str, list[str]]:
        """Download with the list TEXT, while upstream fails; return log and requests."""

        def script(connection: Asked, request: str) -> None:
            good = request.startswith("GET /cam/")
            connection.send(answer(CONTENT) if good else answer(status="404 No"))

        server = Server(self, script)
        client = await self.client()
        cam = await client.add_text("cam", text.replace("BASE", server.url("/cam/")).encode())
        drv, _out = await self.derive(
            client,
            f'"{server.url()}"',
            content_addressed_mirrors=cam,
            sources=[cam],
            **variables,
        )
        await client.build_paths([drv])
        return b"".join(self.log).decode(), [request.split()[1] for request in server.requests]

    async def test_content_addressed(self) -> None:
        """W16"""
        text = """(list (lambda (f a h) #f) (lambda (f a h) (string-append "BASE" f "/"
            (symbol->string a) "/" (bytevector->nix-base32-string h))))"""
        digest = to_base32(hashlib.sha256(CONTENT).digest())
        _, requests = await self.content_addressed(text)
        self.assertEqual(requests, ["/file", f"/cam/file/sha256/{digest}"])

    async def test_hostile_content_addressed(self) -> None:
        """W16, W17, W18: upstream works all the same; methods restrict the rest."""
        hostile = '(list (lambda (f a h) "file:///etc/passwd"))'
        server = Server(self, always(answer(CONTENT)))
        client = await self.client()
        for number, text in enumerate(("(quote ())", '(system "id")', "(", hostile)):
            cam = await client.add_text("cam", text.encode())
            dis = await client.add_text("dis", b'("http://127.0.0.1:1/")')
            variables = {"content_addressed_mirrors": cam, "disarchive_mirrors": dis}
            drv, _ = await self.derive(
                client, f'"{server.url()}"', name=f"f{number}", sources=[cam, dis], **variables
            )
            await client.build_paths([drv])
            methods = "(content-addressed-mirrors disarchive)"
            drv, _out = await self.derive(
                client,
                f'"{server.url()}"',
                name=f"g{number}",
                sources=[cam, dis],
                download_methods=methods,
                **variables,
            )
            status, log = await self.failure(client, drv)
            self.assertEqual(status, 1)
            self.assertIn("not trying Disarchive", log)
        self.assertEqual(len(server.requests), 4)
