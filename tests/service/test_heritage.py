"""`builtin:git-download` from the archive of Software Heritage (spec: downloads §7)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from guixd.build import heritage
from guixd.build.downloadtools import DownloadTools
from guixd.build.heritage import Heritage, NotArchived
from guixd.build.threads import inline
from guixd.client import Client
from guixd.errors import FetchError
from guixd.formats.derivation import Output
from guixd.formats.path import StoreDirectory, StorePath
from tests.build.test_treebox import TOP, tar_of
from tests.net.servers import Asked, FetcherCase, Server, answer, unused_port
from tests.service.test_git_downloads import GitCase
from tests.service.world import set_options
from tests.support import open_files, temporary_directory

COMMIT, SNAPSHOT, RELEASE = "c" * 40, "5" * 40, "e" * 40
DIRECTORY = TOP.rpartition(":")[2]
VAULT = f"/api/1/vault/flat/{TOP}/"
_STORE = StoreDirectory("/gnu/store")


class FakeArchive:
    """An archive on loopback.

    :ivar answers: by method and path, answers as values for JSON, bodies, or statuses; lists
        of them are given one after the other, the last one again and again.
    :ivar asked: methods and paths of all requests.
    """

    def __init__(self, case: TestCase) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []
        self.server = Server(case, self._respond)
        self.url = self.server.url("")
        case.patch(heritage, "HOST", self.url)

    def _respond(self, connection: Asked, request: str) -> None:
        asked = " ".join(request.split(" ")[:2])
        self.asked.append(asked)
        found = self.answers.get(asked, 404)
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        if isinstance(found, int):
            connection.send(answer(b"{}", status=f"{found} Whatever"))
        else:
            body = found if isinstance(found, bytes) else json.dumps(found).encode()
            connection.send(answer(body))

    def knows(self, output_hash: bytes) -> None:
        """Let the archive know DIRECTORY by the hash of its NAR."""
        name = base64.urlsafe_b64encode(output_hash).decode()
        path = f"GET /api/1/extid/nar-sha256/base64url:{name}/?extid_version=1"
        self.answers[path] = {"target": TOP, "extid_type": "nar-sha256"}

    def has(self, *entries: tuple[str, Any]) -> None:
        """Let the vault have made DIRECTORY, with ENTRIES as `tar_of` takes them."""
        self.answers["GET " + VAULT] = {"status": "done", "fetch_url": f"{self.url}/bundle"}
        self.answers["GET /bundle"] = tar_of(*entries)


class _QuickTime:
    """The reactor, but what is to be called later is called at once.

    :ivar waits: how many seconds later each call was to be.
    """

    def __init__(self) -> None:
        self.waits: list[float] = []

    def callLater(self, seconds: float, *arguments: Any) -> Any:
        self.waits.append(seconds)
        return reactor.callLater(0, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)


class ArchiveTests(FetcherCase):
    """What is asked of the archive, and how its answers are understood."""

    def setUp(self) -> None:
        super().setUp()
        self.archive = FakeArchive(self)
        self.time = _QuickTime()
        tools = DownloadTools(self.time, inline, self.fetcher, _STORE, lambda _: True)
        self.said: list[str] = []
        self.client = Heritage(tools, self.said.append)
        path = _STORE.child("0" * 32 + "-x")
        self.digest = hashlib.sha256(b"x").digest()
        self.output = Output(path, "r:sha256", self.digest.hex())

    def find(self, commit: str, url: str = "https://example.org/a b.git") -> Deferred[str]:
        return Deferred.fromCoroutine(self.client.find(self.output, url, commit))

    async def fails(self, work: Deferred[Any], *errors: type[Exception]) -> str:
        try:
            await work
        except errors as error:
            return str(error)
        raise AssertionError("did not fail")

    async def test_find(self) -> None:
        """By the hash; by a commit; by a tag, also if that is a release."""
        answers = self.archive.answers
        self.archive.knows(self.digest)
        self.assertEqual(await self.find(COMMIT), TOP)
        self.assertEqual(len(self.archive.asked), 1)
        self.assertIn("\r\nAccept: application/json", self.archive.server.requests[0])
        answers.clear()
        answers[f"GET /api/1/revision/{COMMIT}/"] = {"directory": DIRECTORY}
        self.assertEqual(await self.find(COMMIT), TOP)
        visit = "GET /api/1/origin/https://example.org/a%20b.git/visit/latest/"
        answers[f"{visit}?require_snapshot=true"] = {"snapshot": SNAPSHOT}
        tag = "branches_from=refs%2Ftags%2Fv1&branches_count=1"
        branch = {"target": COMMIT, "target_type": "revision"}
        answers[f"GET /api/1/snapshot/{SNAPSHOT}/?{tag}"] = {"branches": {"refs/tags/v1": branch}}
        self.assertEqual(await self.find("v1"), TOP)
        private = "https://me:secret@example.org/a b.git"  # The archive learns no password.
        self.assertEqual(await self.find("v1", private), TOP)
        branch.update(target=RELEASE, target_type="release")
        answers[f"GET /api/1/release/{RELEASE}/"] = {"target": COMMIT, "target_type": "revision"}
        self.assertEqual(await self.find("v1"), TOP)

    async def test_nothing_found(self) -> None:
        """Other branches, releases without end, errors, nonsense, ids that are none."""
        answers = self.archive.answers
        origin = "GET /api/1/origin/https://example.org/x/visit/latest/?require_snapshot=true"
        snapshot = f"GET /api/1/snapshot/{SNAPSHOT}/"
        snapshot += "?branches_from=refs%2Ftags%2Fv1&branches_count=1"
        release = {"target": RELEASE, "target_type": "release"}
        branches: list[object] = [
            {"refs/tags/v11": {"target": COMMIT, "target_type": "revision"}},
            {"refs/tags/v1": {"target": RELEASE, "target_type": "alias"}},
            {"refs/tags/v1": release},
            {"refs/tags/v1": {"target": "../" + COMMIT[3:], "target_type": "revision"}},
            {"refs/tags/v1": None},
            [],
            None,
        ]
        answers[origin] = {"snapshot": SNAPSHOT}
        answers[f"GET /api/1/release/{RELEASE}/"] = release
        answers[f"GET /api/1/revision/{COMMIT}/"] = {"directory": DIRECTORY}
        for each in branches:
            answers[snapshot] = {"branches": each}
            url = "https://example.org/x"
            text = await self.fails(self.find("v1", url), NotArchived)
            self.assertIn("does not know", text)
        revision = f"GET /api/1/revision/{COMMIT}/"
        for what in (
            500,
            403,
            b"[" * 100_000,
            b"\xff",
            b"[]",
            {"directory": 5},
            {},
            b"x" * (2 << 20),
        ):
            answers[revision] = what
            await self.fails(self.find(COMMIT), NotArchived)

    async def test_unreachable(self) -> None:
        """Who cannot be reached is not asked another question."""
        self.patch(heritage, "HOST", f"http://127.0.0.1:{unused_port()}")
        text = await self.fails(self.find(COMMIT), FetchError)
        self.assertIn("refused", text)
        self.assertEqual(self.said, [])

    async def cook(self, *states: object) -> Any:
        """Ask the vault, which goes through STATES; return the URL, or the error."""
        self.archive.asked.clear()
        self.archive.answers["GET " + VAULT] = list(states)
        self.archive.answers["POST " + VAULT] = {"status": "new"}
        self.time.waits.clear()
        try:
            return await self.client.cook(TOP)
        except (NotArchived, FetchError) as error:
            return error

    async def test_vault(self) -> None:
        """It is asked once, and then now and then; it may fail once; it may be busy."""
        done = {"status": "done", "fetch_url": "https://example.org/bundle"}
        new, pending, failed = ({"status": name} for name in ("new", "pending", "failed"))
        url = done["fetch_url"]
        self.assertEqual(await self.cook(done), url)
        self.assertEqual((self.archive.asked, self.time.waits), (["GET " + VAULT], []))
        self.assertEqual(await self.cook(404, new, pending, 503, 429, pending, done), url)
        self.assertEqual(self.archive.asked.count("POST " + VAULT), 1)
        self.assertEqual(self.archive.asked.count("GET " + VAULT), 7)
        self.assertEqual(self.time.waits, [heritage.POLL] * 6)
        self.assertEqual(await self.cook(failed, pending, failed, done), url)
        self.assertEqual(self.archive.asked.count("POST " + VAULT), 2)
        self.assertIsInstance(await self.cook(failed), NotArchived)
        self.assertEqual(self.archive.asked.count("POST " + VAULT), 2)

    async def test_saving(self) -> None:
        """What the vault has made is saved as it is; it is not at an address of this machine."""
        directory = temporary_directory(self)
        opened = os.open(directory, os.O_RDONLY)
        self.addCleanup(os.close, opened)
        self.archive.answers["GET /bundle"] = b"\x1f\x8b as it is"
        name = await self.client.save(f"{self.archive.url}/bundle", opened)
        self.assertEqual(Path(directory, name).read_bytes(), b"\x1f\x8b as it is")
        self.patch(heritage, "HOST", "https://archive.example.org")
        saving = Deferred.fromCoroutine(self.client.save(f"{self.archive.url}/bundle", opened))
        self.assertIn("an address of this machine", await self.fails(saving, FetchError))
        self.assertEqual(len(self.archive.asked), 1)

    async def test_senseless_vault(self) -> None:
        for answered in (
            {"status": "done"},
            {"status": "done", "fetch_url": "file:///etc/passwd"},
            {"status": "done", "fetch_url": ["https://example.org"]},
            {"status": "odd"},
            {"status": []},
        ):
            self.assertIsInstance(await self.cook(answered), NotArchived)
        self.assertIsInstance(await self.cook(403), FetchError)


class HeritageTest(GitCase):
    """Through the whole daemon; Git finds nothing, and no server has the archive of the tree."""

    def setUp(self) -> None:
        super().setUp()
        self.archive = FakeArchive(self)
        self.patch(heritage, "POLL", 0.01)
        self.canary = Path(self.directory, "canary")
        self.canary.write_text("alive")

    async def derive_tree(
        self, client: Client, wanted: bytes, name: str = "tree", **variables: str
    ) -> tuple[StorePath, StorePath]:
        """Add a derivation of what has the NAR WANTED, that nobody but the archive has."""
        variables = {"commit": COMMIT, "download_methods": "(swh)", **variables}
        return await self.derive_git(client, wanted, "none", name=name, **variables)

    async def test_tree(self) -> None:
        """With modes and links; the vault needs some time; the log tells of it (W24)."""
        first = self.repository("one")
        wanted = self.wanted("one", first)
        self.archive.knows(hashlib.sha256(wanted).digest())
        entries = (("text", b"first\n"), ("link", "text"), ("program", (0o755, b"#!/bin/sh\n")))
        self.archive.has(*entries)
        done = self.archive.answers["GET " + VAULT]
        states = [404, {"status": "new"}, {"status": "pending"}, done]
        self.archive.answers["GET " + VAULT] = states
        self.archive.answers["POST " + VAULT] = {"status": "new"}
        client = await self.client()
        variables = {"download_methods": "(upstream nar swh)"}
        drv, out = await self.derive_tree(client, wanted, **variables)
        await client.build_paths([drv])
        self.assertEqual(sorted(os.listdir(out)), ["link", "program", "text"])
        self.assertEqual(os.stat(out + "/program").st_mode & 0o777, 0o555)
        self.assertEqual(os.readlink(out + "/link"), "text")
        self.assertEqual(os.listdir(self.directory + "/tmp"), [])
        log = b"".join(self.log).decode()
        self.assertIn("trying Software Heritage\n", log)
        self.assertIn(f"downloading {self.archive.url}/bundle\n", log)

    async def test_attributes(self) -> None:
        """Files become what a checkout makes of them: only what attributes say is changed."""
        tree = self.top / "one"
        self.repository("one")
        attributes = b"*.txt text eol=crlf\n*.id ident\n"
        contents = {
            ".gitattributes": attributes,
            "a.txt": b"1\n2\n",
            "b.id": b"$Id$\n",
            "c.bin": b"1\r\n2\n",
        }
        for name, data in contents.items():
            (tree / name).write_bytes(data)
        self.commit(str(tree))
        wanted = self.wanted("one", self.git("rev-parse", "HEAD", where=str(tree)))
        self.assertIn(b"1\r\n2\r\n", wanted)
        self.archive.knows(hashlib.sha256(wanted).digest())
        program = (0o755, b"#!/bin/sh\n")
        usual = (("text", b"second\n"), ("link", "text"), ("program", program))
        self.archive.has(*usual, *contents.items())
        client = await self.client()
        drv, out = await self.derive_tree(client, wanted)
        await client.build_paths([drv])
        self.assertEqual(Path(out, "a.txt").read_bytes(), b"1\r\n2\r\n")
        self.assertFalse(os.path.exists(out + "/.git"))

    async def test_hostile(self) -> None:
        """W20: other trees, and archives that lead outside: no output, nothing is touched."""
        client = await self.client()
        self.archive.knows(hashlib.sha256(b"x").digest())
        place = str(self.canary)
        for number, entries in enumerate(
            (
                (("a", b"1"),),
                (("l", self.directory), ("l/canary", b"x")),
                (("l", place), ("l", b"x")),
                (("../" * 20 + place[1:], b"x"),),
                (("pipe", {"type": b"6"}),),
            )
        ):
            self.archive.has(*entries)
            drv, out = await self.derive_tree(client, b"x", f"t{number}")
            status, text = await self.failure(client, drv)
            self.assertEqual(status, 1)
            self.assertFalse(os.path.lexists(out))
            self.assertEqual("hash mismatch" in text, number == 0, text)
            self.assertEqual(self.canary.read_text(), "alive")

    async def test_not_wanted(self) -> None:
        """W17: only if the methods say so, and never with submodules."""
        client = await self.client()
        for number, variables in enumerate(
            (
                {"download_methods": "(upstream nar)"},
                {"download_methods": "()"},
                {"recursive?": "#t"},
            )
        ):
            drv, _ = await self.derive_tree(client, b"x", f"t{number}", **variables)
            self.assertEqual((await self.failure(client, drv))[0], 1)
        self.assertEqual(self.archive.asked, [])

    async def test_patience(self) -> None:
        """W21: a vault that needs too long is waited for as long as for a builder."""
        self.archive.knows(hashlib.sha256(b"x").digest())
        self.archive.answers["GET " + VAULT] = {"status": "pending"}
        client = await self.client()
        await client.set_options(set_options(("build-timeout", "1")))
        drv, _ = await self.derive_tree(client, b"x")
        _, text = await self.failure(client, drv)
        self.assertIn("timed out", text)

    async def test_given_up(self) -> None:
        """W21: nothing is left when the client goes."""
        self.archive.knows(hashlib.sha256(b"x").digest())
        self.archive.answers["GET " + VAULT] = {"status": "pending"}
        client = await self.client()
        drv, out = await self.derive_tree(client, b"x")
        before = open_files()
        building = client.build_paths([drv])
        while "GET " + VAULT not in self.archive.asked:
            await self.archive.server.arrivals.get()
        await client.close()
        await self.assertFailure(building, Exception)
        await self.daemon.stop()
        self.assertEqual(os.listdir(self.directory + "/tmp"), [])
        self.assertEqual([name for name in os.listdir(self.store.path) if "chroot" in name], [])
        self.assertFalse(os.path.lexists(out))
        self.assertLessEqual(open_files(), before)
