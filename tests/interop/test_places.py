"""Where the daemon may be led to, and by whom, as the client sees it (spec: substitutes §10)."""

from __future__ import annotations

import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, Place
from tests.interop.test_publish import PublishingCase
from tests.net.lan import Machine, connect, requires_lan

USER = 1000
"""Whose client ends well even if there is nothing to substitute."""


@requires_guest
class Directories(PublishingCase):
    def test_by_whom(self) -> None:
        """U23: a user gets nothing out of a directory by the daemon, whose own user may."""
        url, item = self.publish("--compression=gzip")
        place = Place(self)
        place.use_keys()
        mirror = place.directory / "mirror"
        mirror.mkdir(0o700)
        self.copy(url, item, mirror)
        place.start(GUIXD, "--substitute-urls=", substitutes=True)
        command = ("guix", "build", f"--substitute-urls=file://{mirror} file:///var/empty", item)
        refused = place.run(*command, user=USER)
        self.assertIn(f"in 'file://{mirror}', 'file:///var/empty': only the", refused.err)
        self.assertFalse(place.outside(item).exists())
        self.assertIn(f"from file://{mirror}/nar/gzip/", place.run(*command).err)
        self.assertEqual(place.outside(item).read_text(), "Hello, mirror!\n" * 1000)

    def copy(self, url: str, item: str, mirror: Path) -> None:
        """Let MIRROR have what the server at URL has of ITEM."""
        info = f"{Path(item).name[:32]}.narinfo"
        with urllib.request.urlopen(f"{url}/{info}") as stream:
            text = stream.read()
        (mirror / info).write_bytes(text)
        (mirror / "nar/gzip").mkdir(parents=True)
        with urllib.request.urlopen(f"{url}/nar/gzip/{Path(item).name}") as stream:
            (mirror / "nar/gzip" / Path(item).name).write_bytes(stream.read())


@requires_guest
@requires_lan
class Redirections(PublishingCase):
    """A server on another machine leads to one that only this machine can reach."""

    def lead(self, there: Machine, target: str) -> str:
        """Start a server THERE that redirects to TARGET; return its URL."""

        class Leading(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(302)
                self.send_header("Location", target + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        with there.entered():
            server = ThreadingHTTPServer(("10.9.0.2", 0), Leading)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return f"http://10.9.0.2:{server.server_port}"

    def test_from_elsewhere(self) -> None:
        """U14: it is followed to that machine, but not to here."""
        here, there = Machine(self), Machine(self)
        connect(here, there)
        with here.entered():
            near, item = self.publish()
        with there.entered():
            far, same = self.publish(address="10.9.0.2")
        self.assertEqual(item, same)
        place = Place(self)
        place.use_keys()
        command = ("guix", "build", item)
        with here.entered():
            place.start(GUIXD, "--substitute-urls=", substitutes=True)
            for target in (near, near.replace("127.0.0.1", "0x7f.1")):
                url = self.lead(there, target)
                refused = place.run(*command, f"--substitute-urls={url}", user=USER)
                self.assertIn("is an address of this machine", refused.err)
                self.assertFalse(place.outside(item).exists())
            url = self.lead(there, far)
            place.run(*command, f"--substitute-urls={url}", user=USER)
            self.assertTrue(place.outside(item).exists())

    def test_private_hosts(self) -> None:
        """U16: with the option users lead the daemon nowhere near, but administrators do."""
        near, item = self.publish()
        place = Place(self)
        place.use_keys()
        place.start(GUIXD, "--refuse-private-hosts", "--substitute-urls=", substitutes=True)
        command = ("guix", "build", item, f"--substitute-urls={near}")
        refused = place.run(*command, user=USER)
        self.assertIn("is an address of this machine", refused.err)
        self.assertFalse(place.outside(item).exists())
        place.stop()
        option = f"--substitute-urls={near}"
        place.start(GUIXD, "--refuse-private-hosts", option, substitutes=True)
        place.run(*command, user=USER)
        self.assertTrue(place.outside(item).exists())
