"""Real builds to check, to repair, and in several rounds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from guixd.build.request import BuildMode
from guixd.errors import BuildError
from guixd.formats.path import StorePath
from tests.build.graph import Recorder, World
from tests.build.test_builds import Real
from tests.support import requires_root

RANDOM = "cat /proc/sys/kernel/random/uuid > $out"


def spoil(path: str, text: str = "spoilt") -> None:
    """Change the contents of the store file PATH."""
    os.chmod(path, 0o644)
    Path(path).write_text(text)
    os.chmod(path, 0o444)


class Modes(Real):
    """Builds of outputs that are valid already."""

    contained = True

    def setUp(self) -> None:
        self.world = World(self, use_chroot=self.contained)

    async def check(self, drv: StorePath, **options: object) -> Recorder:
        return await self.succeed(drv, mode=BuildMode.CHECK, **options)

    async def check_fails(self, drv: StorePath, status: int, **options: object) -> Recorder:
        """Check DRV, which must fail with STATUS; nothing is left but what is kept."""
        observer = Recorder()
        with self.assertRaises(BuildError) as caught:
            await self.world.build(drv, observer=observer, mode=BuildMode.CHECK, **options)
        self.error = caught.exception
        self.assertEqual((self.error.status, self.world.leftovers()), (status, []))
        return observer

    def checks(self) -> list[str]:
        """Return what was kept since it differs."""
        names = os.listdir(self.world.store.directory.path)
        return [name[33:] for name in sorted(names) if name.endswith("-check")]


@requires_root
class CheckTests(Modes):
    """`guix build --check`."""

    async def test_same(self) -> None:
        """B15, D24: a success for each output and one for the build; nothing changes."""
        world = self.world
        drv = world.derive(
            "a", "mkdir $out; echo $doc > $out/x; echo d > $doc", outputs=("out", "doc")
        )
        await self.succeed(drv)
        before = [os.stat(world.output(drv, n)) for n in ("out", "doc")]
        info = world.store.database.path_info(world.output(drv))
        observer = await self.check(drv)
        self.assertEqual(observer.traces[1:], [f"@ build-succeeded {drv} -"] * 3)
        self.assertTrue(observer.traces[0].startswith(f"@ build-started {drv} - "))
        self.assertEqual(before, [os.stat(world.output(drv, n)) for n in ("out", "doc")])
        self.assertEqual(info, world.store.database.path_info(world.output(drv)))
        self.assertEqual((world.leftovers(), self.checks()), ([], []))
        self.assertFalse(os.path.lexists(world.output(drv) + ".lock"))

    async def test_different(self) -> None:
        """B15, D24: status 1, no failure for programs, and the output stays as it is."""
        world = self.world
        drv = world.derive("a", RANDOM)
        await self.succeed(drv)
        before = Path(world.output(drv)).read_text()
        observer = await self.check_fails(drv, 1)
        self.assertIn("may not be deterministic", self.error.text)
        self.assertIn("--keep-failed", self.error.text)
        self.assertEqual([t for t in observer.traces if "build-started" not in t], [])
        self.assertEqual(observer.logs[1:], [])
        self.assertEqual((Path(world.output(drv)).read_text(), self.checks()), (before, []))
        self.assertTrue(world.is_valid(drv))

    async def test_keep_different(self) -> None:
        """B15, X18: with keep-failed what differs is kept in place of an older one."""
        world = self.world
        drv = world.derive("a", f"mkdir $out; {RANDOM}/x; chmod 4755 $out/x")
        await self.succeed(drv)
        path = world.output(drv)
        os.mkdir(path + "-check")
        with self.assertRaises(BuildError) as caught:
            await world.build(drv, mode=BuildMode.CHECK, keep_failed=True)
        self.assertIn(f"`{path}-check'", caught.exception.text)
        kept, valid = Path(path + "-check/x"), Path(path + "/x")
        self.assertNotEqual(kept.read_text(), valid.read_text())
        self.assertEqual(kept.stat().st_mode, valid.stat().st_mode)
        self.assertEqual((kept.stat().st_uid, kept.parent.stat().st_uid), (0, 0))
        self.assertFalse(world.store.is_valid(path + "-check"))

    async def test_first_different(self) -> None:
        """B15: outputs before the first that differs are reported as the same."""
        world = self.world
        drv = world.derive("a", f"echo > $doc; {RANDOM}", outputs=("out", "doc"))
        await self.succeed(drv)
        observer = await self.check_fails(drv, 1)
        self.assertEqual(observer.traces[1:], [f"@ build-succeeded {drv} -"])
        self.assertIn(world.output(drv), self.error.text)

    async def test_not_built(self) -> None:
        """B15: what was never built cannot be checked."""
        drv = self.world.derive("a")
        observer = await self.check_fails(drv, 1)
        self.assertIn("build it normally", self.error.text)
        self.assertEqual((observer.traces, observer.logs), ([], []))

    async def test_builder_fails(self) -> None:
        """B15, B39: a builder that fails now does so as usual, and the output stays."""
        world = self.world
        drv = world.derive("a", "touch $out; [ $(($NIX_BUILD_CORES)) = 1 ]")
        await self.succeed(drv, cores=1)
        observer = await self.check_fails(drv, 100, cores=2)
        self.assertTrue(observer.traces[-1].startswith(f"@ build-failed {drv} - 1 builder for"))
        self.assertEqual(Path(world.output(drv)).stat().st_mode & 0o777, 0o444)
        self.assertTrue(world.is_valid(drv))

    async def test_rounds(self) -> None:
        """B15: checking in several rounds compares each with what is valid."""
        drv = self.world.derive("a")
        await self.succeed(drv)
        observer = await self.check(drv, rounds=2)
        self.assertEqual([t.split()[1] for t in observer.traces].count("build-started"), 2)

    async def test_fixed(self) -> None:
        """B15, B23: a fixed output must have its hash first."""
        world = self.world
        good = world.derive(
            "b", "printf x > $out", fixed=("sha1", "11f6ad8ec52a2984abaafd7c3b516503785c2072")
        )
        await self.succeed(good)
        await self.check(good)


@requires_root
class RoundsTests(Modes):
    """`guix build --rounds`."""

    async def test_same(self) -> None:
        """B14, D24: three starts, one success, one log with all of it."""
        world = self.world
        drv = world.derive(
            "a", "echo building; echo $doc > $out; echo > $doc", outputs=("out", "doc")
        )
        observer = await self.succeed(drv, rounds=3, keep_failed=True)
        events = [trace.split()[1] for trace in observer.traces]
        self.assertEqual(events, ["build-started"] * 3 + ["build-succeeded"])
        self.assertEqual(observer.text, "building\n" * 3)
        self.assertEqual((world.leftovers(), self.checks()), ([], []))
        self.assertTrue(world.is_valid(drv))

    async def test_different(self) -> None:
        """B14, D24: status 1, and nothing is registered or kept."""
        world = self.world
        drv = world.derive("a", RANDOM)
        observer = await self.fail_with(1, drv, rounds=2)
        self.assertIn("may not be deterministic", observer.logs[-1])
        self.assertTrue(observer.traces[-1].startswith(f"@ build-failed {drv} - 1 output"))
        self.assertEqual(self.checks(), [])
        self.assertFalse(os.path.lexists(world.output(drv)))

    async def test_keep_different(self) -> None:
        """B14: with keep-failed the one of the round before is kept."""
        drv = self.world.derive("a", RANDOM)
        observer = await self.fail_with(1, drv, rounds=2, keep_failed=True)
        self.assertEqual(self.checks(), ["a-check"])
        self.assertIn(f"`{self.world.output(drv)}-check'", observer.logs[-1])

    async def test_fixed(self) -> None:
        """B14: what has a fixed output is built once."""
        digest = "11f6ad8ec52a2984abaafd7c3b516503785c2072"
        drv = self.world.derive("b", "printf x > $out", fixed=("sha1", digest))
        observer = await self.succeed(drv, rounds=3)
        self.assertEqual(
            [t.split()[1] for t in observer.traces], ["build-started", "build-succeeded"]
        )


@requires_root
class RepairTests(Modes):
    """`guix build --repair`."""

    async def repair(self, drv: StorePath, **options: object) -> Recorder:
        return await self.succeed(drv, mode=BuildMode.REPAIR, **options)

    async def test_contents(self) -> None:
        """B16: spoilt contents are replaced; what is all right is not built."""
        world = self.world
        drv = world.derive(
            "a", "mkdir $out; echo good > $out/x; echo d > $doc", outputs=("out", "doc")
        )
        await self.succeed(drv)
        self.assertEqual((await self.repair(drv)).events, [])
        before = os.stat(world.output(drv, "doc"))
        spoil(world.output(drv) + "/x")
        observer = await self.repair(drv)
        self.assertEqual(
            [t.split()[1] for t in observer.traces], ["build-started", "build-succeeded"]
        )
        self.assertEqual(Path(world.output(drv), "x").read_text(), "good\n")
        self.assertEqual(os.stat(world.output(drv, "doc")), before)
        self.assertEqual(world.leftovers(), [])
        self.assertEqual((await self.repair(drv)).events, [])

    async def test_missing_files(self) -> None:
        """B16: so are files that have vanished."""
        world = self.world
        drv = world.derive("a")
        await self.succeed(drv)
        os.unlink(world.output(drv))
        await self.repair(drv)
        self.assertEqual(Path(world.output(drv)).read_text(), "a\n")

    async def test_builder_fails(self) -> None:
        """B16, B39: if that cannot be done, what there is stays."""
        world = self.world
        drv = world.derive("a", "echo x > $out; [ $(($NIX_BUILD_CORES)) = 1 ]")
        await self.succeed(drv, cores=1)
        spoil(world.output(drv))
        with self.assertRaises(BuildError) as caught:
            await world.build(drv, mode=BuildMode.REPAIR, cores=2)
        self.assertEqual(caught.exception.status, 100)
        self.assertEqual(Path(world.output(drv)).read_text(), "spoilt")
        self.assertTrue(world.is_valid(drv))

    async def test_closure(self) -> None:
        """B16: if the outputs are all right, what they need is repaired by what makes it."""
        world = self.world
        low = world.derive("low")
        top = world.derive("top", f"echo {world.output(low)} > $out", inputs=[low])
        await self.succeed(top)
        spoil(world.output(low))
        observer = await self.repair(top)
        self.assertTrue(observer.traces[-1].endswith(f"{low} -"))
        self.assertEqual(Path(world.output(low)).read_text(), "low\n")

    async def test_source(self) -> None:
        """B16: what nothing makes cannot be repaired."""
        world = self.world
        source = world.file("source", b"text")
        drv = world.derive("a", f"echo {source} > $out", sources=[source])
        await self.succeed(drv)
        spoil(source)
        with self.assertRaises(BuildError) as caught:
            await world.build(drv, mode=BuildMode.REPAIR)
        self.assertIn(f"cannot repair `{source}'", caught.exception.text)


@requires_root
class FailureTests(Modes):
    """`--cache-failures`."""

    def setUp(self) -> None:
        self.world = World(self, cache_failures=True)

    async def test_hit(self) -> None:
        """B28, B2, P24, S33: a failure is remembered until it is cleared; nothing is tried."""
        world = self.world
        low = world.derive("low")
        for name, script, status in ("exit", "exit 1", 100), ("nothing", "true", 1):
            drv = world.derive(name, script, inputs=[low])
            await self.fail_with(status, drv)
            observer = await self.fail_with(100, drv)
            self.assertEqual(observer.traces, [f"@ build-failed {drv} - cached"])
            self.assertIn(f"guix gc --clear-failures {drv}", observer.logs[0])
            world.store.database.clear_failed([drv])
            await self.fail_with(status, drv)

    async def test_dependency(self) -> None:
        """B28, B32: what needs something that failed before fails, and is not remembered."""
        world = self.world
        drv = world.derive("low", "exit 1")
        top = world.derive("top", inputs=[drv])
        await self.fail_with(100, top)
        observer = await self.fail_with(100, top)
        self.assertEqual(observer.traces, [f"@ build-failed {drv} - cached"])
        self.assertEqual(world.store.database.failed_paths(), [world.output(drv)])

    async def test_not_remembered(self) -> None:
        """B28, B36: failures of fixed outputs and timeouts are not remembered."""
        world = self.world
        await self.fail_with(1, world.derive("fixed", "exit 1", fixed=("sha256", "0" * 64)))
        await self.fail_with(101, world.derive("slow", "sleep 1000"), timeout=1)
        self.assertEqual(world.store.database.failed_paths(), [])

    async def test_off(self) -> None:
        """B28, S33: for clients for whom it is off, failures do not count."""
        world = self.world
        drv = world.derive("exit", "exit 1")
        await self.fail_with(100, drv)
        observer = await self.fail_with(
            100, drv, settings=replace(world.settings, cache_failures=False)
        )
        self.assertTrue(observer.traces[0].startswith("@ build-started"))
