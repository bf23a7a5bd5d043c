"""Limits that the administrator sets: memory, processes, weight, free disk."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import namedtuple
from functools import cache
from pathlib import Path

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from guixd.build import cgroups, diskspace, engine
from guixd.build.cgroups import Cgroups, Group, Place, Unavailable, own_place
from guixd.build.threads import inline
from guixd.errors import BuildError
from guixd.settings import BuildLimits
from tests.build.fakes import FakeLauncher
from tests.build.graph import Recorder, World
from tests.build.test_goals import Fake
from tests.support import is_root, requires, temporary_directory


@cache
def control_groups() -> str:
    """Return where the tree of control groups is mounted; empty if it is not, or not for us."""
    if is_root():
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if " - cgroup2 " in line:
                return line.split()[4]
    return ""


@cache
def _has_controllers() -> bool:
    if not control_groups():
        return False
    enabled = Path(control_groups(), "cgroup.subtree_control").read_text().split()
    return {"memory", "pids", "cpu"} <= set(enabled)


requires_cgroups = requires(lambda: bool(control_groups()), "root and cgroup v2")
requires_controllers = requires(
    _has_controllers,
    "root and cgroup v2 with the controllers memory, pids and cpu",
    of_kernel=True,
)


class PlaceTests(SynchronousTestCase):
    """Where our part of the tree is."""

    def place(self, cgroup: str, mounts: str) -> Place:
        process = temporary_directory(self)
        Path(process, "cgroup").write_text(cgroup)
        Path(process, "mountinfo").write_text(mounts)
        return own_place(process)

    def test_places(self) -> None:
        """A service has a part of the tree, a container often the root of what it sees."""
        mount = "30 23 0:26 {} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
        other = "23 1 8:1 / / rw - ext4 /dev/sda rw\n"
        service = self.place("0::/system.slice/guixd.service\n", other + mount.format("/"))
        self.assertEqual(service, Place("/sys/fs/cgroup/system.slice/guixd.service", False))
        container = self.place("1:cpu:/x\n0::/\n", mount.format("/"))
        self.assertEqual(container, Place("/sys/fs/cgroup", True))
        within = self.place("0::/machine/x/y\n", mount.format("/machine/x"))
        self.assertEqual(within, Place("/sys/fs/cgroup/y", False))

    def test_none(self) -> None:
        """Without version 2 there are no limits, and it is said why."""
        for cgroup, mounts in (("1:cpu:/x\n", ""), ("0::/\n", "1 2 0:1 / / rw - tmpfs t rw\n")):
            with self.assertRaisesRegex(Unavailable, "version 2"):
                self.place(cgroup, mounts)


class TreeTests(SynchronousTestCase):
    """What is written where, in a directory that stands for the kernel's."""

    def setUp(self) -> None:
        self.top = Path(temporary_directory(self))
        (self.top / "cgroup.controllers").write_text("cpu memory pids\n")
        (self.top / "cgroup.procs").write_text(f"1\n{os.getpid()}\n")
        (self.top / "cgroup.subtree_control").write_text("")
        (self.top / "guixd-daemon").mkdir()
        (self.top / "guixd-daemon/cgroup.procs").write_text("")

    def test_own_processes(self) -> None:
        """Only our processes move to the leaf; only controllers that are needed are enabled."""
        Cgroups(BuildLimits(memory=1, cpu_weight=5), Place(str(self.top), False))
        procs = (self.top / "guixd-daemon/cgroup.procs").read_text()
        self.assertEqual(procs, str(os.getpid()))
        enabled = (self.top / "cgroup.subtree_control").read_text()
        self.assertEqual(enabled, "+memory +cpu")

    def test_descendants(self) -> None:
        """What our processes have started moves, too, what has ended does not matter."""
        # The shell waits for what it has started, and both for the end of our input.
        with subprocess.Popen(
            ["sh", "-c", "sh -c 'echo $$; read _'; true"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as shell, subprocess.Popen(["true"]) as gone:  # fmt: skip
            assert shell.stdout is not None
            grandchild = shell.stdout.readline().strip()
            gone.wait()
            (self.top / "cgroup.procs").write_text(f"1\n{gone.pid}\n{grandchild}\n")
            moved = []
            self.patch(cgroups, "_write", lambda file, text: moved.append((file, text)))
            Cgroups(BuildLimits(memory=1), Place(str(self.top), False))
        own = str(self.top / "guixd-daemon/cgroup.procs")
        self.assertEqual([pid for file, pid in moved if file == own], [grandchild])

    def test_missing_controller(self) -> None:
        """A controller that was not delegated is named."""
        (self.top / "cgroup.controllers").write_text("cpu\n")
        with self.assertRaisesRegex(Unavailable, "memory, pids are not available"):
            Cgroups(BuildLimits(memory=1, processes=1), Place(str(self.top), False))

    def test_verdict(self) -> None:
        """What the kernel counted is put into words."""
        group = Group(str(self.top), BuildLimits(memory=4096, processes=7))
        self.assertEqual(group.verdict(), "")
        (self.top / "pids.events").write_text("max 3\n")
        self.assertIn("more than the 7 processes", group.verdict())
        (self.top / "memory.events").write_text("low 0\noom 1\noom_kill 0\n")
        self.assertIn("more than the 7 processes", group.verdict())
        (self.top / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
        self.assertIn("more memory than the 4096 bytes", group.verdict())


@requires_cgroups
class EndTests(SynchronousTestCase):
    """The end of a group, by the kernel."""

    def test_end(self) -> None:
        """All processes of a group are killed, and it is removed; twice is no error."""
        group = Group(f"{control_groups()}/guixd-build-test-{os.getpid()}", BuildLimits())
        os.mkdir(group.directory)
        self.addCleanup(group.end)
        join = f'echo 0 > {group.directory}/cgroup.procs; echo in; trap "" TERM; sleep 1000 & wait'
        with subprocess.Popen(["sh", "-c", join], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            self.assertEqual(process.stdout.readline(), b"in\n")
            group.end()
            self.assertEqual(process.wait(), -signal.SIGKILL)
        self.assertFalse(os.path.exists(group.directory))
        group.end()


@requires_controllers
class RealTests(TestCase):
    """Builders that meet their limits."""

    def setUp(self) -> None:
        self.own = f"{control_groups()}/guixd-test-{os.getpid()}"
        os.mkdir(self.own)
        self.addCleanup(os.rmdir, self.own)
        self.patch(engine, "own_place", lambda: Place(self.own, is_root=True))

    async def fails(self, script: str, limits: BuildLimits) -> str:
        world = World(self, build_limits=limits)
        observer = Recorder()
        drv = world.derive("a", script)
        building = world.build(drv, observer=observer)
        building.addErrback(lambda failure: failure.trap(BuildError) and None)
        await building
        self.assertEqual(world.leftovers(), [])
        self.assertEqual([n for n in os.listdir(self.own) if "guixd-build" in n], [])
        return "\n".join(observer.logs)

    async def test_memory(self) -> None:
        """A builder that needs too much memory is killed, and its client reads why."""
        said = await self.fails("x=x; while :; do x=$x$x; done", BuildLimits(memory=32 << 20))
        self.assertIn("more memory than the 33554432 bytes", said)

    async def test_processes(self) -> None:
        """A builder that starts too many processes fails, and its client reads why."""
        script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 9 & done; exit 3"
        self.assertIn(
            "more than the 5 processes", await self.fails(script, BuildLimits(processes=5))
        )

    async def test_weight(self) -> None:
        """The weight is the kernel's, and the builder does not see where it is."""
        world = World(self, build_limits=BuildLimits(cpu_weight=7))
        drv = world.derive("a", "cat /proc/self/cgroup > $out")
        await world.build(drv)
        self.assertIn("0::/\n", Path(world.output(drv)).read_text())


class VerdictTests(SynchronousTestCase):
    """Builders that met a limit, with a directory that stands for the kernel's groups."""

    def test_out_of_memory(self) -> None:
        """B2, B28: no failure for good: the derivation is not to blame, and nothing is kept."""
        top = Path(temporary_directory(self))
        (top / "cgroup.controllers").write_text("memory\n")
        (top / "cgroup.subtree_control").write_text("")
        self.patch(engine, "own_place", lambda: Place(str(top), is_root=True))

        def limit(group: Group) -> None:
            Path(group.directory, "memory.events").write_text("oom_kill 1\n")

        self.patch(Group, "limit", limit)
        launcher, observer = FakeLauncher(), Recorder()
        world = World(
            self, launcher=launcher, threads=inline, clock=Clock(), users=2 if is_root() else 0,
            build_limits=BuildLimits(memory=4096), cache_failures=True,
        )  # fmt: skip
        drv = world.derive("a")
        building = world.build(drv, observer=observer)
        launcher["a"].say("compiling\n")
        launcher["a"].finish(137)
        error = self.failureResultOf(building, BuildError).value
        self.assertEqual(error.status, 1)
        said = "\n".join(observer.logs)
        self.assertIn("exit code 137: it was killed as it needed more memory than the 4096", said)
        self.assertIn("'--build-memory'", said)
        self.assertNotIn("the kernel's log", said)
        self.assertEqual(world.store.database.failed_paths(), [])


class DiskTests(Fake):
    """B36: a minimum of free disk."""

    def lack(self, least: int = 1 << 62) -> None:
        """Let LEAST bytes be the minimum from now on."""
        self.world.engine._common.disk._least = least

    def test_wait(self) -> None:
        """B36: below the minimum a build waits, its client is told, and it begins later."""
        world, observer = self.world, Recorder()
        self.lack()
        drv = world.derive("a")
        building = world.build(drv, observer=observer)
        self.assertEqual(self.launcher.names, [])
        self.assertIn("waits for disk space", observer.logs[0])
        self.assertIn("--min-free-disk", observer.logs[0])
        self.clock.advance(diskspace.LOOK)
        self.assertEqual((self.launcher.names, len(observer.logs)), ([], 1))
        self.lack(1)
        self.clock.advance(diskspace.LOOK)
        self.launcher["a"].finish()
        self.successResultOf(building)
        self.assertIsNone(world.engine._common.disk._timer)

    def test_files(self) -> None:
        """B36: room for few files is too little, too, but not where their number has no limit."""
        real = os.statvfs(self.world.top)
        kind = namedtuple("kind", "f_bavail f_frsize f_files f_favail")
        place = diskspace.DiskSpace(self.clock, ["/x"], 10 << 20)
        for files, available, lacks in (100, 79, True), (100, 80, False), (0, 0, False):
            status = kind(1 << 30, real.f_frsize, files, available)
            self.patch(os, "statvfs", lambda _, status=status: status)
            self.assertIs("room for 79 files in '/x'" in place.lack(), lacks)
            self.assertIs(bool(place.lack()), lacks)

    def test_others_go_on(self) -> None:
        """B36: who waits has no slot and no claim: what another makes valid is taken as it is."""
        world, one, two = self.world, Recorder(), Recorder()
        drv = world.derive("a")
        running = world.build(drv, max_jobs=1)
        self.lack()
        waiting = world.build(world.derive("b"), observer=one, max_jobs=1)
        other = world.build(world.derive("top", inputs=[drv]), observer=two, max_jobs=1)
        self.assertEqual(world.engine._scheduler.running, 1)
        self.launcher["a"].finish()
        self.successResultOf(running)
        self.assertEqual(world.engine._scheduler.running, 0)
        self.assertIn("waits for disk space", "".join(two.logs))
        self.successResultOf(world.build(drv))
        self.lack(1)
        world.engine.freed()
        for name in "b", "top":
            self.launcher[name].finish()
        for building in waiting, other:
            self.successResultOf(building)
        self.assertIsNone(world.engine._common.disk._timer)

    def test_slot_comes_late(self) -> None:
        """B36: when a slot comes, the disk may be full again; it goes to nobody for nothing."""
        world = self.world
        one, two = world.derive("a"), world.derive("b")
        building = world.build(one, two, max_jobs=1)
        first, second = ("a", "b") if self.launcher.names == ["a"] else ("b", "a")
        self.lack()
        self.launcher[first].finish()
        self.assertEqual((self.launcher.names, world.engine._scheduler.running), ([first], 0))
        self.lack(1)
        world.engine.freed()
        self.launcher[second].finish()
        self.successResultOf(building)

    def test_never(self) -> None:
        """B10, B36: who can never get a slot does not wait for disk."""
        self.lack()
        error = self.error(self.world.build(self.world.derive("a"), max_jobs=0))
        self.assertIn("`--max-jobs' is 0", error.text)
        self.assertIsNone(self.world.engine._common.disk._timer)

    def test_given_up(self) -> None:
        """B8, O20: who leaves, or a daemon that stops, ends the wait."""
        world = self.world
        self.lack()
        one = world.build(world.derive("a"))
        one.cancel()
        one.addErrback(lambda _: None)
        self.assertIsNone(world.engine._common.disk._timer)
        two = world.build(world.derive("b"))
        world.engine.close()
        self.assertIn("stopping", self.error(two).text)
        self.assertIsNone(world.engine._common.disk._timer)
