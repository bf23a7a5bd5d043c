"""A small store with a shell in it, and builders run there in real containers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

import guixd.build.zygote
from guixd.build.container import Host, plan, root_directory
from guixd.build.launcher import BuilderProcess, ZygoteLauncher
from guixd.build.users import BuildUser
from guixd.build.workspace import Workspace
from guixd.formats.derivation import Derivation, Output
from guixd.formats.path import StoreDirectory, StorePath
from guixd.sandbox.spec import SandboxSpec
from guixd.settings import Directories, Settings
from tests.support import temporary_directory

BUSYBOX = "/bin/busybox"
BUILD_GID = 100_000
_BOOT_AS = (
    "import sys, os; sys.path[:] = sys.argv[2:]; "
    "from guixd.sandbox.zygote import main; import prctl; "
    "os.setgroups(()); os.setresgid(*[{gid}] * 3); os.setresuid(*[{uid}] * 3); "
    "prctl.set_dumpable(1); main(int(sys.argv[1]))"
)


def free_uid() -> int:
    """Return the first of 256 uids that nobody uses, others in each test process."""
    return 1_000_000_000 + 256 * os.getpid()


class Recorder(ProcessProtocol):
    """Keeps what a builder writes and how it ends.

    :ivar exited: fires with the reason when the process has ended.
    :ivar ended: fires with the reason when its output has ended, too.
    """

    def __init__(self) -> None:
        self.output = b""
        self.exited: Deferred[object] = Deferred()
        self.ended: Deferred[object] = Deferred()
        self._waiting: list[tuple[bytes, Deferred[None]]] = []

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self.output += data
        for text, heard in list(self._waiting):
            if text in self.output:
                self._waiting.remove((text, heard))
                heard.callback(None)

    def processExited(self, reason: Failure) -> None:
        self.exited.callback(reason.value)

    def processEnded(self, reason: Failure) -> None:
        self.ended.callback(reason.value)

    def hear(self, text: bytes) -> Deferred[None]:
        """Return a Deferred that fires when TEXT has been written."""
        heard: Deferred[None] = Deferred()
        if text in self.output:
            heard.callback(None)
        else:
            self._waiting.append((text, heard))
        return heard


@dataclass
class Outcome:
    """How a builder went."""

    text: str
    """What it wrote."""
    code: int | None
    """Its exit code, 0 for success."""
    signal: int | None
    pid: int

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@dataclass
class Build:
    """A builder with its workspace, before it runs."""

    spec: SandboxSpec
    workspace: Workspace


@dataclass
class Place:
    """Where builders of one test run.

    :ivar mode: `users` (build user, container), `rootless`, `plain` (build user
        or this user, no container).
    """

    case: TestCase
    mode: str
    directory: str = field(init=False)
    store: StoreDirectory = field(init=False)
    busybox: StorePath = field(init=False)
    settings: Settings = field(init=False)
    launcher: ZygoteLauncher = field(init=False)
    user: BuildUser | None = field(init=False, default=None)
    _builds: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.directory = temporary_directory(self.case, world_readable=True)
        self.store = StoreDirectory(self.directory + "/store")
        os.mkdir(self.store.path)
        os.mkdir(self.directory + "/tmp")
        os.chmod(self.directory + "/tmp", 0o1777)
        directories = Directories(
            store=self.store.path,
            state=self.directory,
            log=self.directory,
            database=self.directory,
            temporary=self.directory + "/tmp",
        )
        self.settings = Settings(directories=directories)
        os.mkdir(root_directory(self.settings))
        self.busybox = self.item("busybox")
        os.mkdir(self.busybox)
        shutil.copy(BUSYBOX, self.busybox + "/busybox")
        root = os.geteuid() == 0
        uid = free_uid()
        if root and self.mode != "rootless":
            self.user = BuildUser("builder", uid, BUILD_GID, (BUILD_GID,))
        self.host = Host.current()
        if root and self.mode == "rootless":
            # The zygote becomes somebody without privileges, and so do its directories.
            uid += 31
            self.host = replace(self.host, uid=uid, gid=BUILD_GID)
            boot = _BOOT_AS.format(uid=uid, gid=BUILD_GID)
            self.case.patch(guixd.build.zygote, "_BOOT", boot)
        self.launcher = ZygoteLauncher(reactor)
        self.case.addCleanup(self.launcher.stop)

    def item(self, name: str) -> StorePath:
        """Return the path of an item NAME, which is not made."""
        return self.store.child("0" * 32 + "-" + name)

    def derivation(
        self,
        script: str,
        *,
        environment: Mapping[str, str] | None = None,
        fixed: bool = False,
        builder: str | None = None,
        platform: str | None = None,
    ) -> Derivation:
        """Return a derivation whose builder is the shell; `$b` is busybox in it."""
        output = Output(self.item("probe"), *(("sha256", "00" * 32) if fixed else ()))
        return Derivation(
            outputs={"out": output},
            inputs={},
            sources=(self.busybox,),
            platform=platform or self.settings.system,
            builder=self.busybox + "/busybox" if builder is None else builder,
            arguments=("sh", "-c", script),
            environment={
                "b": self.busybox + "/busybox",
                "out": output.path,
                **(environment or {}),
            },
        )

    def prepare(
        self, derivation: Derivation, *, inputs: tuple[StorePath, ...] = (), cores: int = 0
    ) -> Build:
        """Plan DERIVATION and make its directories, which are removed after the test."""
        self._builds += 1
        path = self.store.child(f"{self._builds:032}-probe.drv")
        contained = self.mode != "plain"
        user = self.user
        if user is not None:
            # All that runs as this user may end with the build.
            user = replace(user, uid=user.uid + (self._builds - 1) % 31)
        workspace = Workspace.create(
            path,
            temporary=self.settings.directories.temporary,
            use_chroot=contained,
            user=user,
            plain=not contained,
        )
        self.case.addCleanup(workspace.remove)
        if self.user is None and os.geteuid() == 0:
            own = workspace.store, f"{workspace.chroot}/tmp"
            for name in (workspace.outside, workspace.build_directory, workspace.chroot, *own):
                os.chown(str(name), self.host.uid, self.host.gid)
        spec = plan(
            derivation,
            path,
            (self.busybox, *inputs),
            build_directory=workspace.build_directory,
            private=workspace.chroot,
            user=user,
            settings=self.settings,
            cores=cores,
            host=self.host,
        )
        return Build(spec, workspace)

    async def spawn(self, spec: SandboxSpec) -> tuple[BuilderProcess, Recorder]:
        """Start a builder; it is killed when the test ends."""
        recorder = Recorder()
        process = await self.launcher.spawn(recorder, spec)
        return process, recorder

    async def finish(self, spec: SandboxSpec) -> Outcome:
        """Run a builder to its end."""
        process, recorder = await self.spawn(spec)
        reason = await recorder.ended
        code = getattr(reason, "exitCode", 0)
        text = recorder.output.decode("utf-8", "surrogateescape")
        return Outcome(text, code, getattr(reason, "signal", None), process.pid)

    async def run(self, script: str, **options: object) -> Outcome:
        """Run SCRIPT as a builder to its end; OPTIONS are those of `derivation`."""
        build = self.prepare(self.derivation(script, **options))  # type: ignore[arg-type]
        return await self.finish(build.spec)
