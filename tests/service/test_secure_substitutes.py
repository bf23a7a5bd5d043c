"""Substitutes over TLS, from servers that want passwords (spec: substitutes §7)."""

from __future__ import annotations

from guixd.testing import TemporaryDaemon
from tests.net.test_proxies import TlsServer
from tests.service.substitutes import SubstituteCase
from tests.support import temporary_directory


class Secure(SubstituteCase):
    def make(self, **options: object) -> TemporaryDaemon:
        bundle = temporary_directory(self) + "/ca.pem"
        TlsServer.authority.cert_pem.write_to_path(bundle)
        self.environ = {"SSL_CERT_FILE": bundle}
        return super().make(**options)

    async def test_passwords(self) -> None:
        """U14, W13: a server gets the password that its URL has if its certificate is right."""
        server = TlsServer(self, self.respond)
        url = server.https("me:secret@").removesuffix("/file")
        client = await self.client(urls=url)
        await client.ensure_path(self.offer("item"))
        self.assertIn("Authorization: Basic", server.requests[-1])
        client = await self.client(urls=url.replace("localhost", "127.0.0.1"))
        text = await self.fails(client.ensure_path(self.offer("other")))
        self.assertIn("certificate", text)
        self.assertNotIn("secret", text + self.text())
        self.assertEqual(sum("Authorization" in request for request in server.requests), 1)
