"""Builds without a container of outputs that are valid already (spec: build §9)."""

from __future__ import annotations

import os
from pathlib import Path

from twisted.internet import reactor

from guixd.build.request import BuildMode
from guixd.build.targets import redirected
from guixd.errors import BuildError
from guixd.store.rewriting import rewrite
from guixd.store.roots import TempRoots
from guixd.store.trees import hash_and_scan
from tests.build import test_modes
from tests.build.test_modes import RANDOM, Modes
from tests.store.holder import Holder
from tests.support import DirectoryTestCase, requires_root

SELVES = "mkdir $out; echo $out $doc > $out/text; ln -s $out/text $out/link; echo $doc > $doc"


class PlainCheckTests(test_modes.CheckTests):
    """B37, B15: all of it works without a container, too."""

    contained = False


class PlainRoundsTests(test_modes.RoundsTests):
    """B37, B14: so do rounds."""

    contained = False


class PlainRepairTests(test_modes.RepairTests):
    """B37, B16: so does repairing."""

    contained = False


@requires_root
class PartTests(Modes):
    """Some outputs are valid, others are not."""

    contained = False

    async def test_part(self) -> None:
        """B37, D18: what is made refers to the real paths; the valid output stays as it is."""
        world = self.world
        drv = world.derive("a", SELVES, outputs=("out", "doc"))
        await self.succeed(drv)
        out, doc = world.output(drv), world.output(drv, "doc")
        info = world.store.database.path_info(out)
        before = os.stat(doc)
        world.store.invalidate(out)
        observer = await self.succeed(drv)
        self.assertEqual(len(observer.traces), 2)
        again = world.store.database.path_info(out)
        self.assertEqual((again.nar_hash, again.references), (info.nar_hash, info.references))
        self.assertEqual(info.references, tuple(sorted([out, doc])))
        self.assertEqual(os.readlink(out + "/link"), f"{out}/text")
        self.assertEqual(os.stat(doc), before)
        left = redirected(world.store.directory, drv, doc)
        self.assertFalse(os.path.lexists(left))

    async def test_self_reference(self) -> None:
        """B37: what refers to itself is the same when it is checked."""
        drv = self.world.derive("a", SELVES, outputs=("out", "doc"))
        await self.succeed(drv)
        observer = await self.check(drv)
        self.assertEqual(observer.traces[1:], [f"@ build-succeeded {drv} -"] * 3)
        self.assertEqual(self.strangers(), [])

    async def test_collector(self) -> None:
        """B37, G19: if another process begins to collect before a check, that waits."""
        drv = self.world.derive("a", "echo x > $out")
        await self.succeed(drv)
        store, holder, asked = self.world.store, Holder(self), []
        lock, temp_roots = self.world.settings.directories.state + "/gc.lock", store.temp_roots

        def collected() -> TempRoots:
            asked.append(holder.ask("write", lock))
            reactor.callLater(0, holder.ask, "drop", lock)
            return temp_roots()

        self.patch(store, "temp_roots", collected)
        observer = await self.check(drv)
        self.assertEqual(
            (asked, observer.traces[1:]), (["yes"], [f"@ build-succeeded {drv} -"] * 2)
        )

    async def test_failure(self) -> None:
        """B37: nothing is left of a build that fails."""
        world = self.world
        drv = world.derive("a", f"{RANDOM}; [ $(($NIX_BUILD_CORES)) = 1 ]")
        await self.succeed(drv, cores=1)
        with self.assertRaises(BuildError):
            await world.build(drv, mode=BuildMode.CHECK, cores=2)
        self.assertEqual(self.strangers(), [])

    def strangers(self) -> list[str]:
        """Return what lies in the store but is neither valid nor a lock."""
        store = self.world.store.directory
        names = [name for name in os.listdir(store.path) if name[0] != "."]
        return [
            n for n in names if not self.world.store.is_valid(store.child(n)) and n[-5:] != ".lock"
        ]


class RewritingTests(DirectoryTestCase):
    """B37: replacing hash parts in a tree."""

    OLD, NEW = "0" * 31 + "a", "1" * 31 + "b"

    def rewritten(self, name: str) -> Path:
        rewrite(self.fd, name, "new", {self.OLD: self.NEW})
        return Path(self.at("new"))

    def test_borders(self) -> None:
        """Wherever blocks end, all is replaced and nothing else."""
        old, new = self.OLD.encode(), self.NEW.encode()
        for size in 0, 31, 32, 33, 63, 64, 262144 - 33, 262144 - 16, 262144, 600_000:
            with self.subTest(size=size):
                text = (b"x" * size + old + old[1:] + old) * 2
                Path(self.at("file")).write_bytes(text)
                new_file = self.rewritten("file")
                self.assertEqual(new_file.read_bytes(), text.replace(old, new))
                os.unlink(new_file)

    def test_tree(self) -> None:
        """Names and targets, although the names are in another order afterwards."""
        tree = Path(self.at("tree"))
        tree.mkdir()
        (tree / f"{self.OLD}-x").mkdir()
        (tree / f"{self.OLD}-x" / "in").symlink_to(f"/s/{self.OLD}-x")
        (tree / ("0" * 32)).write_text("first")
        (tree / "run").write_text("")
        (tree / "run").chmod(0o755)
        new = self.rewritten("tree")
        self.assertEqual(sorted(os.listdir(new)), ["0" * 32, f"{self.NEW}-x", "run"])
        self.assertEqual(os.readlink(new / f"{self.NEW}-x" / "in"), f"/s/{self.NEW}-x")
        self.assertEqual((new / "run").stat().st_mode & 0o777, 0o555)
        self.assertEqual(hash_and_scan(self.fd, "new", {self.OLD, self.NEW}).found, {self.NEW})
