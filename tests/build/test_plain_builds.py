"""Real builds without containers, as root with build users."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from twisted.internet.defer import gatherResults

from guixd.errors import BuildError
from tests.build.graph import FIRST_UID, TestCase, World, processes
from tests.support import requires_root


@requires_root
class PlainTests(TestCase):
    """Builds without a container."""

    timeout = 60

    def setUp(self) -> None:
        self.world = World(self, use_chroot=False)

    async def test_build(self) -> None:
        """X21: it works, and nothing is left."""
        world = self.world
        drv = world.derive("plain", "sleep 1000 </dev/null >/dev/null 2>&1 & id -u > $out")
        await world.build(drv)
        self.assertEqual(Path(world.output(drv)).read_text(), f"{FIRST_UID}\n")
        self.assertEqual((processes(), world.leftovers()), ([], []))

    async def test_fresh(self) -> None:
        """CVE-2024-27297, I-FRESH: a descriptor from the build is of no use after it."""
        await self.world.check_fresh(self, self.world.derive("x", "echo x > $out"))

    async def test_failures(self) -> None:
        """B2: statuses are as in a container; a killed build takes escaped processes along."""
        world = self.world
        with self.assertRaises(BuildError) as caught:
            await world.build(world.derive("bad", "touch $out; exit 1"))
        self.assertEqual(caught.exception.status, 100)
        loose = world.derive("loose", "touch $out; chmod 6777 $out")
        with self.assertRaises(BuildError) as caught:
            await world.build(loose)
        self.assertEqual(caught.exception.status, 1)
        self.assertFalse(os.path.lexists(world.output(loose)))
        slow = world.derive("slow", "(sleep 1000 &) ; sleep 1001")
        with self.assertRaises(BuildError) as caught:
            await world.build(slow, timeout=1)
        self.assertEqual(caught.exception.status, 101)
        self.assertEqual((processes(), world.leftovers()), ([], []))

    async def test_foreign_hard_link(self) -> None:
        """B22, S7: a hard link to a file of another user is refused and left as it was."""
        world = self.world
        sentinel = Path(world.store.directory.path, "sentinel")
        sentinel.write_text("mine")
        sentinel.chmod(0o666)
        drv = world.derive("link", f"mkdir $out; ln {sentinel} $out/x")
        with self.assertRaises(BuildError) as caught:
            await world.build(drv)
        self.assertEqual(caught.exception.status, 1)
        self.assertEqual(stat.S_IMODE(sentinel.stat().st_mode), 0o666)

    async def test_kept_user(self) -> None:
        """X20, X22: a user is asked for only if a process of his may be left."""
        world, asked = self.world, list[int]()
        kill_user = world.launcher.kill_user

        def kill(uid: int) -> object:
            asked.append(uid)
            return kill_user(uid)

        self.patch(world.launcher, "kill_user", kill)
        await world.build(world.derive("first"))
        self.assertEqual(asked, [FIRST_UID])
        await world.build(world.derive("leaves", "(sleep 1000 >/dev/null 2>&1 &); echo > $out"))
        self.assertEqual(asked, [FIRST_UID] * 2)
        with self.assertRaises(BuildError):
            await world.build(world.derive("failing", "exit 1"))
        self.assertEqual(asked, [FIRST_UID] * 2)
        await world.build(world.derive("after-failure"))
        self.assertEqual(asked, [FIRST_UID] * 3)

    async def test_several_at_once(self) -> None:
        """Requests side by side do not disturb each other."""
        world = self.world
        drvs = [world.derive(f"d{i}") for i in range(4)]
        await gatherResults([world.build(drv) for drv in drvs])
        self.assertTrue(all(world.is_valid(drv) for drv in drvs))
