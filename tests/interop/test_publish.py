"""Substitutes from the real `guix publish`, with the real client (spec: substitutes §12)."""

from __future__ import annotations

import re
import socket

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, Output, Place


@requires_guest
class Publishing(SynchronousTestCase):
    """One store publishes what it has; others take it from there."""

    maxDiff = None

    def publish(self, *options: str) -> tuple[str, str]:
        """Let a store have an item and publish it; return the URL and the item."""
        place = Place(self)
        place.use_keys()
        source = place.directory / "work/greeting"
        source.write_text("Hello, mirror!\n" * 1000)
        place.start(GUIXD)
        item = place.run("guix", "download", str(source)).lines[0]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        publishing = place.client(
            "guix", "publish", "--listen=127.0.0.1", f"--port={port}", *options
        )

        def stop() -> None:
            publishing.terminate()
            publishing.communicate()

        self.addCleanup(stop)
        assert publishing.stderr is not None
        for line in publishing.stderr:
            if "publishing" in line:
                return f"http://127.0.0.1:{port}", item
        raise AssertionError("guix publish does not serve")

    def take(self, daemon: str, url: str, *command: str) -> tuple[Place, Output]:
        """Run COMMAND with DAEMON on an empty store that substitutes from URL."""
        place = Place(self)
        place.use_keys()
        place.start(daemon, f"--substitute-urls={url}", substitutes=True)
        return place, place.run(*command)

    def test_build(self) -> None:
        """U1, U13: compressions that the stock server offers here."""
        for compression in "gzip", "lzip", "none":
            url, item = self.publish(f"--compression={compression}")
            place, _ = self.take(GUIXD, url, "guix", "build", item)
            text = place.outside(item).read_text()
            self.assertEqual(text, "Hello, mirror!\n" * 1000)
            self.assertEqual(place.run("guix", "gc", "--verify=contents").status, 0)
            place.stop()

    def test_same_words(self) -> None:
        """U24: `guix challenge` and `guix build -n` say what they say with the stock daemon."""
        url, item = self.publish()
        commands = (
            ("guix", "build", "-n", item),
            ("guix", "build", item),
            ("guix", "challenge", f"--substitute-urls={url}", item),
        )
        shown = []
        for daemon in STOCK, GUIXD:
            place, _ = self.take(daemon, url, "guix", "gc", "--list-roots")
            shown.append([place.run(*command, status=None) for command in commands])
            place.stop()
        for stock, guixd in zip(*shown, strict=True):
            self.assertEqual((stock.status, stock.out), (guixd.status, guixd.out), guixd.err)
        self.assertIn("100.0%", _numbers(shown[1][2]))


def _numbers(output: Output) -> str:
    return " ".join(re.findall(r"[0-9.]+%", output.out + output.err))
