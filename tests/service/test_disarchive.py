"""`builtin:download` of what Disarchive can rebuild (spec: downloads §6).

The program is a stand-in with the same command line: it makes of a directory and a
specification one text with both.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from twisted.internet.defer import Deferred

from guixd.build import heritage
from guixd.client import RequestFailed
from guixd.settings import UidRange
from guixd.testing import TemporaryDaemon
from tests.build.test_treebox import TOP
from tests.net.servers import unused_port
from tests.service.downloads import DownloadCase, quoted
from tests.service.test_git_downloads import FIRST_UID
from tests.service.test_heritage import VAULT, FakeArchive
from tests.support import processes_of, temporary_directory

SPECIFICATION = f'(disarchive (addresses (swhid "{TOP}")))\n'
CONTENT = b"from the tree\n" + SPECIFICATION.encode()
PROGRAM = """#!/bin/sh
[ "$1" = assemble ] && [ "$4" = -o ] || exit 2
"""
GOOD = PROGRAM + 'cat "$2/file" "$3" > "$5"\n'


class DisarchiveTest(DownloadCase):
    if os.geteuid() == 0:
        options = {"build_uids": UidRange(FIRST_UID + 4, 2, 64001)}

    def make(self, **options: object) -> TemporaryDaemon:
        self.programs = temporary_directory(self, world_readable=True) + "/bin"
        os.mkdir(self.programs)
        path = f"{self.programs}:{os.environ['PATH']}"
        self.patch(os, "environ", {**os.environ, "PATH": path})
        return super().make(**options)

    def setUp(self) -> None:
        super().setUp()
        self.archive = FakeArchive(self)
        self.patch(heritage, "POLL", 0.01)
        self.archive.has(("file", b"from the tree\n"))
        self.canary = Path(self.directory, "canary")
        self.canary.write_text("secret\n")
        self.canary.chmod(0o600)

    def install(self, text: str = GOOD) -> None:
        program = Path(self.programs, "disarchive")
        program.write_text(text)
        program.chmod(0o755)

    async def derive_archive(self, name: str = "archive.tar", **variables: str) -> tuple[str, str]:
        """Add a derivation of a file that only Disarchive can make; return it and its output."""
        self.wanted = await self.client()
        nothing, mirror = (
            f"http://me:hidden@127.0.0.1:{unused_port()}/",
            f"{self.archive.url}/specs/",
        )
        mirrors = await self.wanted.add_text("mirrors", quoted(nothing, mirror).encode())
        drv, out = await self.derive(
            self.wanted,
            f'"http://127.0.0.1:{unused_port()}/{name}"',
            content=CONTENT,
            name=name,
            disarchive_mirrors=mirrors,
            sources=[mirrors],
            **variables,
        )
        return drv, out

    def know(self, specification: str = SPECIFICATION) -> None:
        """Let the server have the SPECIFICATION of what is wanted."""
        digest = hashlib.sha256(CONTENT).hexdigest()
        self.archive.answers[f"GET /specs/sha256/{digest}"] = specification.encode()

    async def test_rebuilt(self) -> None:
        self.install()
        self.know()
        drv, out = await self.derive_archive()
        await self.wanted.build_paths([drv])
        self.assertEqual(Path(out).read_bytes(), CONTENT)
        self.assertEqual(os.stat(out).st_uid, os.geteuid())
        self.assertEqual(os.listdir(self.directory + "/tmp"), [])

    async def test_not_there(self) -> None:
        """W17, W18: without the program nobody is asked; nor if that is not wanted."""
        self.know()
        drv, _ = await self.derive_archive()
        status, text = await self.failure(self.wanted, drv)
        self.assertEqual(status, 1)
        self.assertIn("not trying Disarchive, which is not installed", text)
        self.install()
        drv, _ = await self.derive_archive("other", download_methods="(upstream)")
        status, text = await self.failure(self.wanted, drv)
        self.assertNotIn("Disarchive", text)
        self.assertEqual(self.archive.asked, [])

    async def test_failures(self) -> None:
        """No specification, or one of nothing; programs that fail or make something else."""
        self.install()
        self.know()
        specifications = ("", f'(swhid "{TOP}f")')
        for number, specification in enumerate(specifications):
            self.know(specification)
            drv, out = await self.derive_archive(f"s{number}")
            self.assertEqual((await self.failure(self.wanted, drv))[0], 1)
        self.assertEqual([asked for asked in self.archive.asked if "vault" in asked], [])
        self.know()
        for number, script in enumerate(
            (
                'echo wrong > "$5"',
                f'ln -s {self.canary} "$5"',
                'mkfifo "$5"',
                'cat "$2/file" "$3" > "$5"; ln "$5" other',
                f'cat {self.canary} {self.store.path}/* > "$5"',
                'touch /usr/x "$HOME/../x" && cat "$2/file" "$3" > "$5"',
            )
        ):
            self.install(PROGRAM + script + "\n")
            drv, out = await self.derive_archive(f"t{number}")
            status, text = await self.failure(self.wanted, drv)
            self.assertEqual(status, 1, script)
            self.assertFalse(os.path.lexists(out), script)
            self.assertNotIn("secret\n", text)
            self.assertNotIn("hidden", text)
            self.assertEqual("hash mismatch" in text, "wrong" in script, text)

    async def test_given_up(self) -> None:
        """W21: the program and what it has started are killed with the build."""
        self.install(PROGRAM + "sleep 1000 & echo begun; sleep 1000\n")
        self.know()
        drv, out = await self.derive_archive()
        begun: Deferred[None] = Deferred()

        def log(data: bytes) -> None:
            if b"begun" in data:
                begun.callback(None)

        self.wanted.log = log
        building = self.wanted.build_paths([drv])
        await begun
        self.assertIn("GET " + VAULT, self.archive.asked)
        await self.daemon.stop()
        await self.assertFailure(building, RequestFailed)
        self.assertFalse(os.path.lexists(out))
        self.assertEqual(os.listdir(self.directory + "/tmp"), [])
        self.assertEqual(processes_of((FIRST_UID + 4, FIRST_UID + 5)), [])
