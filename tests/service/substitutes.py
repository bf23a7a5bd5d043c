"""A substitute server whose answers a test chooses, and a daemon that asks it."""

from __future__ import annotations

import gzip
import hashlib
import os
from typing import Any

from guixd.client import Client
from guixd.formats.hashes import to_base32
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from guixd.signatures import KeyPair, read_key_pair
from tests.net.servers import Asked, Server, answer
from tests.service.downloads import DownloadCase
from tests.service.world import set_options
from tests.signatures.keys import configuration, install
from tests.signatures.offers import narinfo_of


class SubstituteCase(DownloadCase):
    """A daemon that takes what its own key has signed, and a server with such things.

    :ivar answers: by the path of a URL, what the server sends, or what it does instead.
    """

    def setUp(self) -> None:
        super().setUp()
        install(self.directory + "/etc", acl=True)
        self.host = read_key_pair(self.directory + "/etc")
        self.stranger = read_key_pair(str(configuration(self, "rsa")))
        self.answers: dict[str, object] = {}
        self.server = Server(self, self.respond)
        self.url = self.server.url("")

    def respond(self, connection: Asked, request: str) -> None:
        path = request.split(" ")[1]
        found = self.answers.get(path, answer(b"", status="404 Not Found"))
        if callable(found):
            found(connection, request)
        else:
            assert isinstance(found, bytes)
            connection.send(found)

    def asked(self, word: str) -> int:
        """Return how many requests have had WORD in their first line."""
        return sum(word in request.split("\r\n")[0] for request in self.server.requests)

    async def client(
        self, endpoint: object = None, *, urls: str | None = None, **more: str
    ) -> Client:
        """Return a client that wants substitutes and traces."""
        client = await super().client(endpoint)
        pairs = {"substitute-urls": self.url if urls is None else urls, **more}
        await client.set_options(
            set_options(*((name.replace("_", "-"), value) for name, value in pairs.items()))
        )
        return client

    def narinfo(
        self,
        path: StorePath,
        nar: bytes,
        references: tuple[StorePath, ...] = (),
        *,
        keys: KeyPair | str | None = "host",
        **said: Any,
    ) -> bytes:
        """Return what a server says of the item PATH with the archive NAR."""
        pair = self.host if isinstance(keys, str) else keys
        return narinfo_of(path, nar, references, keys=pair, **said)

    def offer(
        self,
        name: str,
        content: bytes = b"content",
        references: tuple[StorePath, ...] = (),
        *,
        nar: bytes | None = None,
        path: StorePath | None = None,
        **said: object,
    ) -> StorePath:
        """Let the server have an item; return its path."""
        path = path or self.path(name)
        nar = nar_of_file(content) if nar is None else nar
        compression = said.get("compression", "none")
        body = gzip.compress(nar) if compression == "gzip" else nar
        self.answers[f"/{path.hash_part}.narinfo"] = answer(
            self.narinfo(path, nar, references, **said)
        )
        self.answers[f"/nar/{path.base}"] = answer(body)
        return path

    def path(self, name: str) -> StorePath:
        """Return a path with a hash part of its own."""
        digest = hashlib.sha256(name.encode()).digest()[:20]
        return self.store.child(f"{to_base32(digest)}-{name}")

    def leftovers(self) -> list[str]:
        """Return what lies in the store and is no item, nor the pool."""
        return [name for name in os.listdir(self.store.path) if name.startswith("guixd-")]

    def text(self) -> str:
        """Return what the last client was told."""
        return b"".join(self.log).decode()

    def assertNothing(self, path: StorePath) -> None:
        """Nothing is at PATH, nor on its way there."""
        self.assertFalse(os.path.lexists(path))
        self.assertEqual(self.leftovers(), [])
