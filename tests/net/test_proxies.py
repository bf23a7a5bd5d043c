"""Proxies and TLS: which are used, and what comes of it (W12, W13, U26)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import trustme
from twisted.internet import reactor
from twisted.internet.ssl import PrivateCertificate
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import FetchError
from guixd.net.client import Fetcher
from guixd.net.proxies import Proxies, Proxy
from tests.net.servers import Asked, FetcherCase, Server, always, answer, unused_port
from tests.support import require, temporary_directory


class ChoiceTest(SynchronousTestCase):
    """W12"""

    def via(self, url: str, **environ: str) -> str:
        proxy = Proxies.from_environment(environ).proxy_for(url)
        return "" if proxy is None else proxy.name

    def test_each_scheme_has_its_own(self) -> None:
        both = {"http_proxy": "http://a:1", "https_proxy": "b:2"}
        self.assertEqual(self.via("http://x/", **both), "a:1")
        self.assertEqual(self.via("https://x/", **both), "b:2")
        self.assertEqual(self.via("https://x/", http_proxy="http://a:1"), "")
        self.assertEqual(self.via("http://x/", http_proxy="http://a"), "a:80")
        for name in ("all_proxy", "ALL_PROXY"):
            for url in ("http://x/", "https://x/"):
                self.assertEqual(self.via(url, **{name: " c:3 "}), "c:3")
            self.assertEqual(self.via("ftp://x/", **{name: "c:3"}), "")
        self.assertEqual(self.via("http://x/", all_proxy="c:3", http_proxy=""), "")
        self.assertEqual(self.via("http://x/", http_proxy="http://[::1]:8/"), "[::1]:8")

    def test_upper_case(self) -> None:
        self.assertEqual(self.via("http://x/", HTTP_PROXY="a:1"), "a:1")
        self.assertEqual(self.via("http://x/", HTTP_PROXY="a:1", REQUEST_METHOD="GET"), "")
        self.assertEqual(self.via("https://x/", HTTPS_PROXY="a:1", REQUEST_METHOD="GET"), "a:1")
        self.assertEqual(self.via("http://x/", http_proxy="", HTTP_PROXY="a:1"), "")

    def test_exceptions(self) -> None:
        for exceptions, url, straight in (
            ("example.org", "http://example.org/", True),
            ("example.org", "http://a.example.org/", True),
            (".example.org", "http://a.example.org/", True),
            ("*.example.org", "http://a.example.org/", True),
            ("example.org", "http://badexample.org/", False),
            ("example.org:81", "http://example.org/", False),
            ("example.org:80", "http://example.org/", True),
            ("*", "http://example.org/", True),
            ("x, 127.0.0.1", "http://127.0.0.1:5/", True),
            ("10.0.0.0/8 y", "http://10.2.3.4/", True),
            ("10.0.0.0/8", "http://11.2.3.4/", False),
            ("[::1]:80", "http://[::1]/", True),
            ("::1", "http://[::1]:5/", True),
            ("fd00::/8", "http://[fd12::1]/", True),
            ("EXAMPLE.org", "http://Example.ORG./", True),
            ("", "http://example.org/", False),
            (",,", "http://example.org/", False),
            ("example.org", "http://127.0.0.1/", False),
            ("10.1.2.3/8", "http://10.2.3.4/", True),
            ("*.example.org.", "http://a.example.org/", True),
            (".", "http://example.org./", False),
            ("example.org:443", "https://example.org/", True),
            ("example.org:80", "https://example.org/", False),
            ("example.org:x", "http://example.org:5/", True),
            ("[::1]:80", "http://[::1]:81/", False),
        ):
            for name in ("no_proxy", "NO_PROXY"):
                via = self.via(url, all_proxy="p:1", **{name: exceptions})
                self.assertEqual(via == "", straight, (exceptions, url))

    def test_credentials_and_nonsense(self) -> None:
        proxies = Proxies.from_environment({"http_proxy": "http://me:p%40ss@a:1"})
        self.assertEqual(proxies.proxy_for("http://x/"), Proxy("a", 1, "me:p@ss"))
        proxies = Proxies.from_environment({"http_proxy": "me@a"})
        self.assertEqual(proxies.proxy_for("http://x/"), Proxy("a", 80, "me:"))
        for value in ("socks5://a:1", "http://", "http://a:x", ":"):
            with self.assertRaises(FetchError, msg=value) as caught:
                Proxies.from_environment({"http_proxy": value}).proxy_for("http://x/")
            text = "http_proxy is not the address of a proxy"
            if "socks" in value:
                text = "http_proxy: proxies of type 'socks5' are not supported"
            self.assertEqual((caught.exception.kind, caught.exception.text), ("proxy", text))


class TinyProxy:
    """A real proxy, which asks for a user and a password if LOGIN is not empty."""

    def __init__(self, case: FetcherCase, login: str = "") -> None:
        program = shutil.which("tinyproxy")
        require(program is not None, "tinyproxy")
        configuration = temporary_directory(case) + "/conf"
        self.port = unused_port()
        lines = [f"Port {self.port}", "Listen 127.0.0.1", "MaxClients 20"]
        if login:
            lines.append(f"BasicAuth {login}")
        Path(configuration).write_text("\n".join([*lines, ""]))
        reading, writing = os.pipe()
        command = [str(program), "-d", "-c", configuration]
        self._process = subprocess.Popen(command, stdout=writing, stderr=writing)
        os.close(writing)
        case.addCleanup(os.close, reading)
        case.addCleanup(self.stop)
        self._log, self._reading = b"", reading
        while b"Accepting connections" not in self._log:
            part = os.read(reading, 4096)
            assert part, self._log
            self._log += part
        os.set_blocking(reading, False)

    @property
    def log(self) -> str:
        """What it has said so far."""
        try:
            while part := os.read(self._reading, 4096):
                self._log += part
        except BlockingIOError:
            pass
        return self._log.decode()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


class TlsServer(Server):
    """A server with a certificate for `localhost` by an authority of its own."""

    authority = trustme.CA()

    def __init__(self, case: FetcherCase, script: object) -> None:
        super().__init__(case, script)  # type: ignore[arg-type]
        certificate = self.authority.issue_cert("localhost")
        pem = certificate.private_key_pem.bytes() + certificate.cert_chain_pems[0].bytes()
        options = PrivateCertificate.loadPEM(pem).options()
        port = reactor.listenSSL(0, self, options, interface="127.0.0.1")
        case.addCleanup(self._stop, port)
        self.tls_number = port.getHost().port

    def https(self, user: str = "") -> str:
        return f"https://{user}localhost:{self.tls_number}/file"


class WaysTest(FetcherCase):
    def through(self, proxy: str, **environ: str) -> Fetcher:
        return self.make_fetcher({"http_proxy": proxy, "https_proxy": proxy, **environ})

    def trusting(self, **environ: str) -> Fetcher:
        bundle = temporary_directory(self) + "/ca.pem"
        TlsServer.authority.cert_pem.write_to_path(bundle)
        return self.make_fetcher({"SSL_CERT_FILE": bundle, **environ})

    async def test_tls(self) -> None:
        """W13: unknown certificates are right only for who does not care, and gives no password."""
        server = TlsServer(self, always(answer(b"secure")))
        self.assertEqual((await self.refused(server.https())).kind, "tls")
        self.assertEqual((await self.fetch(server.https(), verify=False))[0], b"secure")
        error = await self.refused(server.https("me:secret@"), verify=False)
        self.assertEqual(error.kind, "credentials")
        self.assertEqual(len(server.requests), 1)
        fetcher = self.trusting()
        body, _ = await self.fetch(server.https("me:secret@"), fetcher=fetcher)
        self.assertEqual(body, b"secure")
        self.assertIn("Authorization: Basic", server.requests[-1])
        wrong = server.https().replace("localhost", "127.0.0.1")
        self.assertEqual((await self.refused(wrong, fetcher=fetcher)).kind, "tls")

    async def test_a_real_proxy(self) -> None:
        """W12, U26: http straight through it, https by CONNECT; connections are kept."""
        proxy = TinyProxy(self)
        server = TlsServer(self, always(answer(b"hello")))
        fetcher = self.trusting(
            http_proxy=f"127.0.0.1:{proxy.port}", https_proxy=f"http://127.0.0.1:{proxy.port}/"
        )
        self.assertEqual((await self.fetch(server.url(), fetcher=fetcher))[0], b"hello")
        self.assertIn("Via:", server.requests[0].title())
        for _ in range(2):
            self.assertEqual((await self.fetch(server.https(), fetcher=fetcher))[0], b"hello")
        self.assertEqual(proxy.log.count("CONNECT localhost:"), 1)
        answers = {}
        await fetcher.lookup([server.url()] * 20, answers.__setitem__)
        self.assertEqual({a.body for a in answers.values()}, {b"hello"})
        self.assertEqual(len(answers), 20)

    async def test_passwords_of_proxies(self) -> None:
        """W12: right ones, wrong ones, none."""
        proxy = TinyProxy(self, "me secret")
        server = TlsServer(self, always(answer(b"hello")))
        right = self.through(f"http://me:secret@127.0.0.1:{proxy.port}")
        self.assertEqual((await self.fetch(server.url(), fetcher=right))[0], b"hello")
        body, _ = await self.fetch(server.https(), fetcher=right, verify=False)
        self.assertEqual(body, b"hello")
        for user in ("", "me:wrong@"):
            wrong = self.through(f"http://{user}127.0.0.1:{proxy.port}")
            for url in (server.url(), server.https()):
                error = await self.refused(url, fetcher=wrong, verify=False)
                self.assertIn(error.kind, ("proxy", "http"))
                self.assertIn(f"proxy 127.0.0.1:{proxy.port}", error.text)
                self.assertNotIn("wrong@", error.text)
        self.assertEqual(len(server.requests), 2)

    async def test_names_that_are_not_ascii(self) -> None:
        """W2, W12"""
        proxy = Server(self, always(answer(b"hello")))
        fetcher = self.through(f"http://127.0.0.1:{proxy.number}")
        await self.fetch("http://bücher.example/", fetcher=fetcher)
        self.assertIn("GET http://xn--bcher-kva.example/ HTTP", proxy.requests[0])
        proxy.script = always(answer(status="403 No"))
        await self.refused("https://bücher.example/", fetcher=fetcher)
        self.assertIn("CONNECT xn--bcher-kva.example:443 HTTP", proxy.requests[1])
        for host in ("ä..b", "a..b", "a" * 64):
            self.assertEqual((await self.refused(f"http://{host}/")).kind, "url")

    async def test_names_with_underscores(self) -> None:
        """W2: servers have them, certificates do not."""
        self.assertEqual((await self.refused("http://a_b.invalid/")).kind, "dns")
        self.assertEqual((await self.refused("https://a_b.invalid/")).kind, "tls")
        self.assertEqual((await self.refused("https://a_b.invalid/", verify=False)).kind, "dns")

    async def test_proxies_that_are_not_there(self) -> None:
        """W12"""
        port = unused_port()
        fetcher = self.through(f"http://127.0.0.1:{port}")
        for url in ("http://example.invalid/", "https://example.invalid/"):
            error = await self.refused(url, fetcher=fetcher)
            self.assertEqual(error.kind, "connect")
        error = await self.refused("http://x.invalid/", fetcher=self.through("a..b"))
        self.assertEqual(error.kind, "connect")
        error = await self.refused("http://x.invalid/", fetcher=self.through("socks5://x"))
        self.assertEqual(error.kind, "proxy")

    async def test_proxies_that_misbehave(self) -> None:
        """W12: it dies in the middle, answers nonsense, wants a password, or shows a page."""

        def dying(connection: Asked, _: str) -> None:
            connection.send(answer(b"hel", length=5))
            connection.close()

        proxy = Server(self, dying)
        fetcher = self.through(f"http://127.0.0.1:{proxy.number}")
        error = await self.refused("http://example.invalid/", fetcher=fetcher)
        self.assertEqual(error.kind, "body")
        for response in (
            answer(b"<html>", status="403 Forbidden"),
            b"nonsense\r\n\r\n",
            answer(status="407 No"),
        ):
            proxy.script = always(response)
            error = await self.refused("https://example.invalid/", fetcher=fetcher)
            self.assertEqual(error.kind, "proxy", error.text)
        proxy.script = lambda connection, _: connection.close()
        error = await self.refused("https://example.invalid/", fetcher=fetcher)
        self.assertEqual(error.kind, "proxy")

    async def test_exceptions_go_straight(self) -> None:
        """W12, U26"""
        server = Server(self, always(answer(b"hello")))
        fetcher = self.through(f"http://127.0.0.1:{unused_port()}", no_proxy="127.0.0.0/8")
        self.assertEqual((await self.fetch(server.url(), fetcher=fetcher))[0], b"hello")
