"""Real builds by a daemon without privileges."""

from __future__ import annotations

import os
from pathlib import Path

from twisted.trial.unittest import SkipTest

from guixd.errors import BuildError
from tests.build.graph import Recorder, TestCase, World
from tests.support import is_root, requires_user_namespaces


@requires_user_namespaces
class RootlessTests(TestCase):
    """Builds in user namespaces; for a run as a plain user."""

    timeout = 60

    def setUp(self) -> None:
        if is_root():
            raise SkipTest("runs without privileges only")
        self.world = World(self, users=0)

    async def test_build(self) -> None:
        """B7, B21, X31: it builds, the result is as for root, and nothing is left."""
        world = self.world
        dep = world.derive("dep", "mkdir $out; id -u > $out/uid; chmod 500 $out", outputs=("out",))
        drv = world.derive(
            "user", "cat $dep/uid > $out", inputs=[dep], environment={"dep": world.output(dep)}
        )
        await world.build(drv)
        self.assertEqual(Path(world.output(drv)).read_text(), "30001\n")
        self.assertEqual(Path(world.output(dep)).stat().st_mode & 0o7777, 0o555)
        self.assertEqual(world.leftovers(), [])

    async def test_failure(self) -> None:
        """B2, B39: a failing build: 100, its output is left, the directories are not."""
        world, observer = self.world, Recorder()
        drv = world.derive("bad", "mkdir $out; touch $out/x; chmod 555 $out; exit 1")
        with self.assertRaises(BuildError) as caught:
            await world.build(drv, observer=observer)
        self.assertEqual(caught.exception.status, 100)
        self.assertTrue(Path(world.output(drv), "x").exists())
        self.assertFalse(world.is_valid(drv))
        self.assertEqual(world.leftovers(), [])

    async def test_planted_store(self) -> None:
        """X32: a builder that exchanges the store's parent for a link gets nothing by it."""
        world = self.world
        secret = Path(world.top, "secret")
        secret.mkdir()
        drv = world.derive(
            "plant",
            'chmod 755 /; mv /tmp /moved; mkdir -p /tmp; ln -s / "${NIX_STORE%/s}"; touch /x',
        )
        with self.assertRaises(BuildError) as caught:
            await world.build(drv)
        self.assertIn(caught.exception.status, (1, 100))
        self.assertFalse(world.is_valid(drv))
        self.assertEqual(os.listdir(secret), [])
        self.assertEqual(world.leftovers(), [])

    async def test_without_container(self) -> None:
        """X21: it also works without containers."""
        world = World(self, users=0, use_chroot=False)
        drv = world.derive("plain", "id -u > $out")
        await world.build(drv)
        self.assertEqual(Path(world.output(drv)).read_text(), f"{os.getuid()}\n")
