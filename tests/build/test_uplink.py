"""Builds with a fixed output and their network, from the request to the valid output."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.web.server import Site

from guixd.build.container import Host
from guixd.errors import BuildError
from tests.build.graph import Recorder, TestCase, World, reactor
from tests.support import requires_root, temporary_directory
from tests.uplink.slirp import requires_slirp, script, slirp_directory
from tests.uplink.test_network import Page

PAGE = ("sha256", hashlib.sha256(b"fetched\n").hexdigest())


class _Building:
    def make_world(self, path: str, **settings: Any) -> World:
        """Return a world whose daemon has PATH."""
        assert isinstance(self, TestCase)
        host = replace(Host.current(), environment={"PATH": path})
        self.patch(Host, "current", lambda: host)
        return World(self, users=2, **settings)

    def fetch(self, world: World, **options: Any) -> Any:
        """Return a derivation that fetches a page from this machine's loopback."""
        assert isinstance(self, TestCase)
        port = reactor.listenTCP(0, Site(Page()), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        url = f"http://10.0.2.2:{port.getHost().port}/"
        return world.derive("page", f"busybox wget -q -O $out {url}", **options)


@requires_slirp
class ConnectedTests(_Building, TestCase):
    """With slirp4netns."""

    timeout = 60

    async def test_fetch(self) -> None:
        """X29: a build with a fixed output fetches it; nothing is told and nothing is left."""
        world, observer = self.make_world(slirp_directory(self)), Recorder()
        drv = self.fetch(world, fixed=PAGE)
        await world.build(drv, observer=observer)
        self.assertEqual(Path(world.output(drv)).read_text("utf-8"), "fetched\n")
        self.assertFalse([line for line in observer.logs if "network" in line])
        self.assertEqual(world.leftovers(), [])

    async def test_isolated(self) -> None:
        """X29: with `--isolate-host-loopback` it cannot."""
        world = self.make_world(slirp_directory(self), isolate_host_loopback=True)
        drv = self.fetch(world, fixed=PAGE)
        with self.assertRaises(BuildError) as caught:
            await world.build(drv)
        self.assertIn(caught.exception.status, (1, 100))
        self.assertEqual(world.leftovers(), [])

    async def test_no_fixed_output(self) -> None:
        """X9: no other build has a network."""
        world, observer = self.make_world(slirp_directory(self)), Recorder()
        drv = world.derive("page", "busybox ip -o link > $out")
        await world.build(drv)
        self.assertNotIn("tap0", Path(world.output(drv)).read_text("utf-8"))
        drv = self.fetch(world)
        with self.assertRaises(BuildError):
            await world.build(drv, observer=observer)
        self.assertFalse([line for line in observer.logs if "no network" in line])


@requires_root
class UnconnectedTests(_Building, TestCase):
    """Where there is no network for builds."""

    timeout = 60

    async def check(self, path: str, why: str) -> None:
        """Build with PATH; the client is told WHY there is no network."""
        world, observer = self.make_world(path), Recorder()
        text = "busybox ip -o link | busybox grep -c : > count; [ $(cat count) = 1 ]; echo x > $out"
        digest = hashlib.sha256(b"x\n").hexdigest()
        drv = world.derive("fixed", text, fixed=("sha256", digest))
        await world.build(drv, observer=observer)
        notices = [line for line in observer.logs if "this build has no network" in line]
        self.assertEqual(len(notices), 1, observer.logs)
        self.assertIn(why, notices[0])
        self.assertTrue(world.is_valid(drv))
        self.assertEqual(world.leftovers(), [])

    async def test_no_program(self) -> None:
        """X28: without slirp4netns the client is told, and the build has no network."""
        await self.check("/nowhere", "PATH")

    async def test_old_program(self) -> None:
        """X28: likewise with one that cannot be given a device."""
        directory = script(Path(temporary_directory(self, world_readable=True)), "#!/bin/sh\n")
        await self.check(str(directory), "1.3.0" if os.path.exists("/dev/net/tun") else "tun")
