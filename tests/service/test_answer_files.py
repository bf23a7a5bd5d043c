"""Where the daemon keeps the answers of substitute servers (U15)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from guixd.formats.narinfocache import directory_name
from guixd.testing import TemporaryDaemon
from tests.service.substitutes import SubstituteCase


class AnswerFiles(SubstituteCase):
    home: str | None = None

    def make(self, **options: Any) -> TemporaryDaemon:
        if self.home is not None:
            self.patch(type(self), "environ", {"XDG_CACHE_HOME": self.home % self.directory})
        return super().make(**options)

    async def kept(self, directory: str) -> None:
        """The answer about an item is in a file of DIRECTORY, and suffices from then on."""
        path = self.offer("item")
        client = await self.client()
        self.assertTrue(await client.has_substitutes(path))
        await client.close()
        await self.daemon.stop()
        file = Path(self.directory, directory, directory_name(self.url), path.hash_part)
        self.assertIn(f"StorePath: {path}", file.read_text())
        self.daemon = self.make()
        self.daemon.start()
        self.addCleanup(self.daemon.stop)
        self.answers.clear()
        client = await self.client()
        self.assertTrue(await client.has_substitutes(path))
        self.assertEqual(self.asked(".narinfo"), 1)

    async def test_state(self) -> None:
        await self.kept("var/substitute/cache")


class CacheHome(AnswerFiles):
    home = "%s/home"

    async def test_state(self) -> None:
        """XDG_CACHE_HOME of the daemon counts."""
        await self.kept("home/guix/substitute")
        self.assertFalse(os.path.exists(f"{self.directory}/var/substitute"))


class RelativeHome(AnswerFiles):
    home = "home%.0s"

    async def test_state(self) -> None:
        """A relative one does not, as nobody knows to what."""
        await self.kept("var/substitute/cache")
