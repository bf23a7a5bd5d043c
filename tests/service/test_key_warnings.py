"""What is said when nobody's substitutes are taken, and until when (U29)."""

from __future__ import annotations

import os
from pathlib import Path

from twisted.logger import LogEvent, formatEvent, globalLogPublisher

from tests.service.substitutes import SubstituteCase
from tests.signatures.keys import golden

NOBODY = "nobody is authorised to sign substitutes"
ITSELF = "only this machine itself is authorised to sign substitutes"


class KeyWarningsTest(SubstituteCase):
    def setUp(self) -> None:
        super().setUp()
        self.logged: list[str] = []
        globalLogPublisher.addObserver(self.hear)
        self.addCleanup(globalLogPublisher.removeObserver, self.hear)
        self.acl = Path(self.directory, "etc/acl")
        self.item = self.offer("item")

    def hear(self, event: LogEvent) -> None:
        if event["log_namespace"].endswith("keywarnings"):
            self.logged.append(formatEvent(event))

    def authorise(self, *kinds: str) -> None:
        """Let the list be of the keys KINDS, as an administrator changes it."""
        entries = b"".join(
            b"(entry %b (tag (guix import)))" % golden(f"{kind}.pub") for kind in kinds
        )
        new = self.acl.with_name("new")
        new.write_bytes(b"(acl %b)" % entries)
        os.replace(new, self.acl)

    async def told(self) -> str:
        """Return what a new client is told that asks twice, and then builds."""
        client = await self.client()
        for _ in range(2):
            await client.substitutable_paths([self.item])
        building = client.build_paths([self.item])
        building.addErrback(lambda _: None)
        await building
        return self.text()

    async def test_changes(self) -> None:
        """An empty list, others' keys, one's own: at once, and each reason told once."""
        self.authorise()
        for _ in range(2):
            self.assertEqual((await self.told()).count(NOBODY), 1)
        self.assertFalse(os.path.exists(self.item))
        self.assertEqual([NOBODY in line for line in self.logged], [True])
        client = await self.client()
        self.authorise("rsa")
        self.assertEqual(await client.substitutable_paths([self.item]), ())
        self.authorise("rsa", "ecc")
        self.assertEqual(await client.substitutable_paths([self.item]), (self.item,))
        self.authorise("ecc")
        self.assertEqual(await client.substitutable_paths([self.item]), (self.item,))
        self.assertEqual(self.text().count("authorised"), 1)
        self.assertIn(f"warning: {ITSELF}", self.text())
        self.authorise()
        self.assertEqual(await client.substitutable_paths([self.item]), ())
        self.assertIn(NOBODY, self.text())
        self.assertEqual([NOBODY in line for line in self.logged], [True, False, True])

    async def test_no_list(self) -> None:
        """Without a list one is made of the own key; without that nobody counts."""
        self.acl.unlink()
        key = self.acl.with_name("signing-key.pub")
        key.rename(key.with_suffix(".away"))
        self.assertIn(NOBODY, await self.told())
        self.assertFalse(os.path.exists(self.item) or self.acl.exists())
        key.with_suffix(".away").rename(key)
        self.assertIn(ITSELF, await self.told())
        self.assertTrue(os.path.exists(self.item) and self.acl.exists())

    async def test_not_asked(self) -> None:
        """Who wants no substitutes hears nothing of it."""
        self.authorise()
        client = await self.client(urls="")
        self.assertEqual(await client.substitutable_paths([self.item]), ())
        self.assertEqual((self.text(), self.logged), ("", []))

    async def test_malformed(self) -> None:
        """A list that cannot be read is another matter, and says so itself."""
        self.acl.write_text("(acl")
        client = await self.client()
        error = await self.fails(client.substitutable_paths([self.item]))
        self.assertIn("malformed", error)
        self.assertEqual((self.text(), self.logged), ("", []))
