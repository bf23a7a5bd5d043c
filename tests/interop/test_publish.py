"""Substitutes from the real `guix publish`, with the real client (spec: substitutes §12)."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.breaking import Breaking
from tests.interop.guest import requires_guest
from tests.interop.place import CLIENT_SECONDS, GUIXD, STOCK, Output, Place
from tests.net.lan import Machine, announce, connect, requires_lan

GREETING = "Hello, mirror!\n" * 1000


def package(_: object, place: Place) -> str:
    """Build a package that nothing but the tests' tools makes; return its output."""
    building = place.client("guix", "build", "-m", "manifest.scm", PACKAGES="there")
    return place.finish(building).lines[0]


class PublishingCase(SynchronousTestCase):
    """One store publishes what it has; others take it from there."""

    maxDiff = None

    def greeting(self, place: Place) -> str:
        """Add a file to a store; return the item."""
        source = place.directory / "work/greeting"
        source.write_text(GREETING)
        return place.run("guix", "download", str(source)).lines[0]

    def publish(
        self,
        *options: str,
        address: str = "127.0.0.1",
        make: Callable[[Any, Place], str] = greeting,
    ) -> tuple[str, str]:
        """Let a store have what MAKE makes and publish it; return the URL and the item."""
        place = Place(self)
        place.use_keys()
        place.start(GUIXD)
        item = make(self, place)
        with socket.create_server((address, 0)) as probe:
            port = probe.getsockname()[1]
        publishing = place.client(
            "guix", "publish", f"--listen={address}", f"--port={port}", *options
        )

        def stop() -> None:
            publishing.terminate()
            publishing.communicate()

        self.addCleanup(stop)
        assert publishing.stderr is not None
        for line in publishing.stderr:
            if "publishing" in line:
                return f"http://{address}:{port}", item
        raise AssertionError("guix publish does not serve")


@requires_guest
class Publishing(PublishingCase):
    def take(self, daemon: str, url: str, *command: str) -> tuple[Place, Output]:
        """Run COMMAND with DAEMON on an empty store that substitutes from URL."""
        place = Place(self)
        place.use_keys()
        place.start(daemon, f"--substitute-urls={url}", substitutes=True)
        return place, place.run(*command)

    def test_build(self) -> None:
        """U1, U13: compressions that the stock server offers here."""
        for compression in "gzip", "lzip", "zstd", "0":
            url, item = self.publish(f"--compression={compression}")
            place, took = self.take(GUIXD, url, "guix", "build", item)
            directory = "" if compression == "0" else f"{compression}/"
            self.assertIn(f"{url}/nar/{directory}{item.rpartition('/')[2]}", took.err)
            self.assertEqual(place.outside(item).read_text(), GREETING)
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

    def test_weather(self) -> None:
        """U24: `guix weather` of packages one of which is there; it is downloaded, not built."""
        url, item = self.publish(make=package)
        shown = []
        for daemon in STOCK, GUIXD:
            place, _ = self.take(daemon, url, "true")
            weather = ("guix", "weather", f"--substitute-urls={url}", "-m", "manifest.scm")
            said = place.run(*weather, status=1)  # not all is there
            self.assertIn("50.0%", said.out)
            self.assertIn("(1 out of 2)", said.out)
            shown.append(re.sub(r"[0-9.]+ (seconds|requests per second)", r"N \1", said.out))
            if daemon == GUIXD:
                built = place.run("guix", "build", "-m", "manifest.scm")
                self.assertIn(item, built.lines)
                self.assertIn(f"downloading from {url}", built.err)
                self.assertEqual(len(re.findall("successfully built", built.err)), 1)
            place.stop()
        self.assertEqual(shown[1], shown[0])

    def test_breaking(self) -> None:
        """U11, U12, U18: archives that break off come whole; missing ones are built, or not."""
        url, item = self.publish(make=package)
        server = Breaking(self, url, missing=False)
        build = ("guix", "build", "-m", "manifest.scm")
        place, built = self.take(GUIXD, server.url, *build)
        self.assertIn(f"downloading from {server.url}", built.err)
        self.assertEqual(place.outside(item).read_text(), "there-0\n")
        self.assertEqual((server.ranges[0], len(server.ranges)), (0, 3))
        self.assertEqual(server.ranges, sorted(server.ranges))
        place.stop()
        server = Breaking(self, url, missing=True)
        place, _ = self.take(GUIXD, server.url, "true")
        failed = place.run(*build, status=1)
        self.assertIn("404", failed.err)
        self.assertIn("--fallback", failed.err)
        self.assertIn(item, place.run(*build, "--fallback").lines)
        self.assertEqual(place.outside(item).read_text(), "there-0\n")
        place.stop()

    def test_repair(self) -> None:
        """U19, P18: `guix gc --verify=contents,repair` takes a damaged item anew from there.

        The stock daemon shares what it gets with the damaged file, if that is in its pool.
        """
        url, item = self.publish()
        shown = []
        for daemon in STOCK, GUIXD:
            place, _ = self.take(daemon, url, "guix", "build", item)
            file = place.outside(item)
            for in_place in (False, True) if daemon == GUIXD else (False,):
                if in_place:
                    file.chmod(0o644)
                else:
                    file.unlink()
                file.write_text("damaged")
                place.run("guix", "gc", "--verify=contents", status=1)
                repairing = place.run("guix", "gc", "--verify=contents,repair")
                self.assertTrue(file.read_text() == GREETING, repairing.err)
                place.run("guix", "gc", "--verify=contents")
            shown.append(_plain(repairing.err))
            place.stop()
        self.assertEqual(shown[1], shown[0])


@requires_guest
@requires_lan
class Discovering(PublishingCase):
    """The other store is on another machine, which announces it."""

    def test_discovered(self) -> None:
        """U25: nobody names the server, and it is used."""
        here, there = Machine(self), Machine(self)
        connect(here, there)
        with there.entered():
            url, item = self.publish(address="10.9.0.2")
        place = Place(self)
        place.use_keys()
        published = place.directory / "state/discover/publish"
        published.parent.mkdir()
        changed = changes_in(self, published.parent)
        with here.entered():
            place.start(GUIXD, "--discover", "--substitute-urls=", substitutes=True)
            announce(self, there, "10.9.0.2", f"guix-publish-there={url.removeprefix('http://')}")
            while not (published.exists() and published.read_text() == f"{url}\n"):
                self.assertTrue(changed(), place.log())
            output = place.run("guix", "build", item)
        self.assertIn(f"from {url}", output.err)
        self.assertEqual(place.outside(item).read_text(), GREETING)


def changes_in(case: SynchronousTestCase, directory: Path) -> Callable[[], bool]:
    """Return what waits until a file in DIRECTORY has got its name, and says whether one has."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
    case.addCleanup(signal.pthread_sigmask, signal.SIG_SETMASK, before)
    descriptor = os.open(directory, os.O_RDONLY)
    case.addCleanup(os.close, descriptor)
    fcntl.fcntl(descriptor, fcntl.F_NOTIFY, fcntl.DN_RENAME | fcntl.DN_MULTISHOT)
    return lambda: signal.sigtimedwait({signal.SIGIO}, CLIENT_SECONDS) is not None


def _plain(text: str) -> list[str]:
    """Return what verification says in TEXT, without what tells of downloads."""
    return [line for line in text.splitlines() if re.match("(reading|checking|path) ", line)]


def _numbers(output: Output) -> str:
    return " ".join(re.findall(r"[0-9.]+%", output.out + output.err))
