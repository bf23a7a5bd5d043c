"""Downloads that the stock client asks for: guixd does what the stock daemon does."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

from twisted.trial.unittest import SynchronousTestCase

from guixd.build.mirrorcode import urls
from guixd.client import nar_of_tree
from guixd.formats.hashes import to_base32
from guixd.formats.nar import nar_of_file
from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, Facts, Place
from tests.support import require

CONTENT = b"what is wanted\n"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = {"/good": CONTENT, "/wrong": b"something else\n"}.get(self.path, b"")
        status = 200 if body else 302 if self.path == "/redirect" else 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 302:
            self.send_header("Location", "/good")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def serve(case: SynchronousTestCase, handler: Callable[..., BaseHTTPRequestHandler]) -> str:
    """Start a server for the time of a test, in a thread; return its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    case.addCleanup(thread.join)
    case.addCleanup(server.server_close)
    case.addCleanup(server.shutdown)
    return f"http://127.0.0.1:{server.server_port}"


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@requires_guest
class Checkouts(SynchronousTestCase):
    """The stock daemon cannot be compared with: it has a Git of its own."""

    def test_checkouts(self) -> None:
        """W19: what the stock client asks for is understood."""
        require(shutil.which("git") is not None, "git")
        place = Place(self)
        place.names["VIEW_NET"] = "host"
        repository = place.directory / "repository"
        repository.mkdir()

        def git(*arguments: str) -> str:
            identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
            command = ["git", *identity, *arguments]
            return subprocess.run(
                command, cwd=repository, check=True, capture_output=True, text=True
            ).stdout.strip()

        git("init", "--quiet")
        (repository / "file").write_text("text\n")
        git("add", ".")
        git("commit", "--quiet", "-m", "x")
        git("tag", "v1")
        git("update-server-info")
        wanted = place.directory / "wanted"
        wanted.mkdir()
        shutil.copy(repository / "file", wanted)
        url = serve(self, partial(_Files, directory=str(place.directory)))
        place.start(GUIXD)
        facts = place.scheme(
            "git.scm",
            REPOSITORY=f"{url}/repository/.git",
            COMMIT=git("rev-parse", "HEAD"),
            WANTED=hashlib.sha256(b"".join(nar_of_tree(str(wanted)))).hexdigest(),
        )
        for label in ("commit", "tag"):
            self.assertEqual(facts.text(f"{label} builder"), "builtin:git-download")
            self.assertEqual(facts[label], "ok")
            self.assertEqual(facts.text(f"{label} content"), "text\\n")


@requires_guest
class Downloads(SynchronousTestCase):
    """W1 to W24, where they can be compared."""

    maxDiff = None

    def setUp(self) -> None:
        self.url = serve(self, _Answers)

    def facts(self, daemon: str) -> Facts:
        place = Place(self)
        place.names["VIEW_NET"] = "host"
        place.start(daemon)
        shown = place.scheme(
            "downloads.scm",
            SERVER=self.url,
            WANTED=hashlib.sha256(CONTENT).hexdigest(),
            EXECUTABLE=hashlib.sha256(nar_of_file(CONTENT, True)).hexdigest(),
        )
        place.stop()
        return shown

    def test_downloads(self) -> None:
        """W2, W7, W9, W10, W14, W15, W16: results, traces and files are the same."""
        stock, guixd = self.facts(STOCK), self.facts(GUIXD)
        self.assertEqual(guixd["one"], "ok")
        self.assertEqual(stock, guixd)
        # W16: the list that clients pass.
        shown = guixd["content-addressed mirrors"]
        text = shown.strip('"').replace('\\"', '"').replace("\\\\", "\\").replace("\\n", "\n")
        digest = hashlib.sha256(CONTENT).digest()
        base32 = to_base32(digest)
        self.assertEqual(
            urls(text, "file", "sha256", digest),
            [
                f"https://bordeaux.guix.gnu.org/file/file/sha256/{base32}",
                f"https://ci.guix.gnu.org/file/file/sha256/{base32}",
                f"https://tarballs.nixos.org/sha256/{base32}",
                f"https://archive.softwareheritage.org/api/1/content/sha256:{digest.hex()}/raw/",
            ],
        )
