"""Substitute servers that are directories of this machine (spec: substitutes §10; U23)."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guixd.formats.nar import nar_of_file
from guixd.net import codecs
from guixd.testing import TemporaryDaemon
from tests.net.test_codecs import lzip
from tests.service.substitutes import SubstituteCase
from tests.service.world import EndpointAs
from tests.support import requires_root

NAR = nar_of_file(b"content")


class DirectoryCase(SubstituteCase):
    """A directory with one item in it."""

    def setUp(self) -> None:
        super().setUp()
        self.files = Path(self.directory, "files")
        (self.files / "nar").mkdir(parents=True)
        self.item = self.path("item")
        self.archive = self.files / "nar" / self.item.base
        self.info = self.files / f"{self.item.hash_part}.narinfo"
        self.put()

    def put(self, compress: Callable[[bytes], bytes] = bytes, **said: Any) -> None:
        """Let the directory have the item."""
        self.archive.write_bytes(compress(said.pop("archive", NAR)))
        self.info.write_bytes(self.narinfo(self.item, NAR, **said))

    async def take(self, urls: str, endpoint: object = None) -> bool:
        """Ask for the item with a client of its own; return whether it is valid afterwards."""
        client = await self.client(endpoint, urls=urls, print_extended_build_trace="1")
        building = client.build_paths([self.item])
        building.addErrback(lambda failure: self.log.append(str(failure.value).encode()))
        await building
        valid, said = await client.is_valid_path(self.item), self.log
        await client.close()
        if valid:
            await (await self.client()).collect_garbage(3, [self.item])
        self.log = said
        return valid

    async def refuses(self, because: str) -> None:
        """The item cannot be had, and nothing of it is left."""
        self.assertFalse(await self.take(str(self.files)))
        self.assertIn(because, self.text())
        self.assertNothing(self.item)


class GoodDirectory(DirectoryCase):
    async def test_archives(self) -> None:
        """U13, U20, U23: compression is undone elsewhere, never by the daemon itself."""

        def feed(codec: object, data: bytes) -> object:
            raise AssertionError("the daemon decompresses")

        self.patch(codecs._Members, "feed", feed)
        self.patch(codecs._Plain, "feed", feed)
        compressions: dict[str, Callable[[bytes], bytes]] = {
            "none": bytes,
            "gzip": gzip.compress,
            "lzip": lzip,
        }
        for name, compress in compressions.items():
            self.put(compress, compression=name)
            for url in (str(self.files), f"file://{self.files}", f"file://localhost{self.files}/"):
                self.assertTrue(await self.take(url), (name, url))
            size = self.archive.stat().st_size
            where = f"{self.item} file://{self.archive} {size}"
            for line in (f"started {where}", f"progress {where} {size}", f"succeeded {where}"):
                self.assertIn(f"\n@ download-{line}\n", self.text())

    async def test_behind_a_link(self) -> None:
        """U23: the administrator may name a directory by a link; only below it none counts."""
        link = Path(self.directory, "link")
        link.symlink_to(self.files)
        self.assertTrue(await self.take(f"file://{link}"))

    async def test_large(self) -> None:
        """U23: more than fits in one read, and than the pipe takes."""
        content = os.urandom(1 << 20) * 5
        nar = nar_of_file(content)
        self.archive.write_bytes(gzip.compress(nar, 1))
        self.info.write_bytes(self.narinfo(self.item, nar, compression="gzip"))
        self.assertTrue(await self.take(str(self.files)))


class UntrustedClients(DirectoryCase):
    """Clients on TCP are nobody's."""

    tcp = True

    def make(self, **options: Any) -> TemporaryDaemon:
        own = (f"file://{self.directory}/own", "http://127.0.0.1:1")
        return super().make(**options, substitute_urls=own)

    async def test_no_reading_with_the_rights_of_the_daemon(self) -> None:
        """U23: what a client may not read it gets neither by name nor by URL."""
        self.files.chmod(0o700)
        spellings = [
            str(self.files),
            f"file://{self.files}",
            f"FILE://localhost{self.files}/.",
            f"{self.directory}/own/../files",
        ]
        for url in spellings:
            self.assertFalse(await self.take(url, self.port))
            self.assertIn(f"not looking for substitutes in '{url}'", self.text())
            self.assertNotIn("download-started", self.text())
            self.assertNothing(self.item)
        client = await self.client(self.port, urls=" ".join(spellings))
        self.assertEqual(len(self.log), 1)  # guix's client cannot read more so early
        self.assertIn(spellings[-1], self.text())
        self.assertEqual(await client.substitutable_paths([self.item]), ())
        self.assertTrue(await self.take(str(self.files)))  # the daemon's own user
        self.assertNotIn("not looking", self.text())

    async def test_others_still_count(self) -> None:
        """U23: with the directory skipped, the next server is asked."""
        path = self.offer("other", b"other")
        client = await self.client(self.port, urls=f"{self.files} {self.url}")
        await client.build_paths([path])
        self.assertTrue(await client.is_valid_path(path))

    async def test_directories_of_the_daemon(self) -> None:
        """U23: what the administrator has named, everybody may."""
        self.files.rename(f"{self.directory}/own")
        self.assertTrue(await self.take(f"{self.directory}/own/", self.port))
        self.assertNotIn("not looking", self.text())


@requires_root
class OtherUsers(DirectoryCase):
    async def test_of_this_machine(self) -> None:
        """U23: a user that is not the daemon's is not trusted, either."""
        self.assertFalse(await self.take(str(self.files), EndpointAs(self.daemon.socket, 1001)))
        self.assertIn("not looking for substitutes", self.text())


class HostileDirectory(DirectoryCase):
    """Somebody else can write into a directory that the administrator has named."""

    def setUp(self) -> None:
        super().setUp()
        self.canary = Path(self.directory, "canary")
        self.canary.mkdir(0o700)

    async def test_links(self) -> None:
        """U23: neither archives, nor narinfos, nor directories of them may be links."""
        secret = self.canary / self.item.base
        self.archive.rename(secret)
        self.archive.symlink_to(secret)
        await self.refuses("is not a regular file")
        self.archive.unlink()
        self.archive.parent.rmdir()
        self.archive.parent.symlink_to(self.canary)
        await self.refuses("Too many levels of symbolic links")
        self.archive.parent.unlink()
        self.archive.parent.mkdir()
        secret.rename(self.archive)
        self.assertTrue(await self.take(str(self.files)))
        self.info.rename(self.canary / "narinfo")
        self.info.symlink_to(self.canary / "narinfo")
        other = Path(self.directory, "same")  # as the answer for the first is remembered
        self.files.rename(other)
        self.files = other
        await self.refuses("is not a regular file")

    async def test_what_would_hang(self) -> None:
        """U23: a pipe lets nobody wait, as archive or as narinfo."""
        self.archive.unlink()
        os.mkfifo(self.archive)
        await self.refuses("is not a regular file")
        self.archive.unlink()
        self.archive.mkdir()
        await self.refuses("is not a regular file")
        self.info.unlink()
        other = Path(self.directory, "same")
        self.files.rename(other)
        self.files = other
        os.mkfifo(other / self.info.name)
        await self.refuses("is not a regular file")

    async def test_elsewhere(self) -> None:
        """U23: names that lead out of the directory are no places."""
        secret = self.canary / "secret"
        secret.write_bytes(NAR)
        for url in (str(secret), f"file://{secret}", "../canary/secret", "nar/../../canary/secret"):
            self.files.joinpath("nar").touch()
            self.info.write_bytes(self.narinfo(self.item, NAR, url=url))
            self.files = self.files.rename(self.files.with_name(self.files.name + "x"))
            self.info = self.files / self.info.name
            self.assertFalse(await self.take(str(self.files)))
            self.assertNotIn("@ substituter-started", self.text())
            self.assertNothing(self.item)

    async def test_bombs(self) -> None:
        """U30: an archive that never ends, and one that is longer than was signed."""
        self.put(gzip.compress, archive=bytes(64 << 20), compression="gzip")
        await self.refuses("bytes came")
        with self.archive.open("wb") as file:
            file.truncate(1 << 40)
        self.info.write_bytes(self.narinfo(self.item, NAR))
        self.files = self.files.rename(self.files.with_name("same"))
        await self.refuses("bytes came")

    async def test_garbage(self) -> None:
        """U10: what cannot be undone, and what is cut off."""
        self.put(lambda nar: b"garbage" + nar, compression="gzip")
        await self.refuses("garbled")
        self.archive.write_bytes(gzip.compress(NAR)[:-9])
        await self.refuses("incomplete")
        self.archive.unlink()
        await self.refuses("No such file")
        self.put(gzip.compress, compression="gzip")
        self.assertTrue(await self.take(str(self.files)))
