"""A store of its own with an engine, and derivations to build in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred
from twisted.python.threadpool import ThreadPool
from twisted.trial.unittest import SynchronousTestCase, TestCase

from guixd.build.engine import Engine
from guixd.build.launcher import ZygoteLauncher
from guixd.build.outputs import Harvest
from guixd.build.request import BuildMode, BuildRequest, ClientOptions, Wanted
from guixd.build.threads import pool_threads
from guixd.formats import derivation
from guixd.formats.derivation import Derivation, HashCache, Output
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from guixd.settings import Directories, Settings, UidRange
from guixd.store.local import LocalStore
from guixd.store.trees import dump
from tests.support import processes_of, temporary_directory

BUSYBOX = "/bin/busybox"
TOOLS = (
    *("cat", "chmod", "cp", "dd", "env", "gzip", "head", "id", "kill", "ln", "ls", "mkdir"),
    *("mkfifo", "mv", "ps", "rm", "sh", "sleep", "stat", "touch", "tr", "true", "yes"),
)
reactor: Any = installed
FIRST_UID = 200_000 + 16 * os.getpid()
"""Other build users in each test process: who has a build user kills its processes."""
GID = 64099


@dataclass
class Recorder:
    """An observer that keeps what it is told, in order.

    :ivar events: `("log", level, text)`, `("trace", line)`, `("output", bytes)` and
        `("words", lines, file)`.
    """

    events: list[tuple[Any, ...]] = field(default_factory=list)
    blocked: Deferred[None] | None = None
    instead: list[str] = field(default_factory=list)
    """What is told in place of traces to who gets none."""
    _wanted: list[tuple[str, Deferred[None]]] = field(default_factory=list)

    def log(self, level: int, text: str) -> None:
        self._add(("log", int(level), text), text)

    def trace(self, line: str, instead: str = "") -> None:
        if instead:
            self.instead.append(instead)
        self._add(("trace", line), line)

    def output(self, pid: int, chunk: bytes) -> None:
        self._add(("output", chunk), self.text + chunk.decode())

    def last_words(self, lines: Sequence[str], file: str) -> None:
        self._add(("words", tuple(lines), file), "")

    def full(self) -> Deferred[None] | None:
        if self.blocked is None:
            return None
        waiter: Deferred[None] = Deferred()
        self.blocked.addCallback(lambda _: waiter.callback(None))
        return waiter

    def _add(self, event: tuple[Any, ...], text: str) -> None:
        self.events.append(event)
        for part, waiter in list(self._wanted):
            if part in text:
                self._wanted.remove((part, waiter))
                waiter.callback(None)

    def seen(self, part: str) -> Deferred[None]:
        """Wait until PART comes: in a line, or in all of the output together."""
        waiter: Deferred[None] = Deferred()
        if part in self.text or any(part in line for line in self.traces + self.logs):
            waiter.callback(None)
        else:
            self._wanted.append((part, waiter))
        return waiter

    @property
    def text(self) -> str:
        """All output."""
        return b"".join(e[1] for e in self.events if e[0] == "output").decode()

    @property
    def traces(self) -> list[str]:
        return [e[1] for e in self.events if e[0] == "trace"]

    @property
    def logs(self) -> list[str]:
        return [e[2] for e in self.events if e[0] == "log"]


class World:
    """A store in a temporary directory, an engine, and a shell in the store.

    :param users: how many build users there are; 0 for the daemon's own user.
    :param launcher: what starts builders; by default the real one.
    :param substitutes: what need not be built; by default nothing.
    """

    def __init__(
        self,
        case: SynchronousTestCase,
        *,
        users: int = 2,
        launcher: Any = None,
        threads: Any = None,
        clock: Any = None,
        substitutes: Any = None,
        **settings: Any,
    ) -> None:
        self.top = top = temporary_directory(case, world_readable=True)
        directories = Directories(
            store=f"{top}/s",
            state=f"{top}/var",
            log=f"{top}/log",
            database=f"{top}/var/db",
            configuration=f"{top}/etc",
            temporary=f"{top}/tmp",
        )
        os.mkdir(directories.temporary, 0o755)
        uids = UidRange(FIRST_UID, users, GID) if users else None
        self.settings = Settings(directories=directories, build_uids=uids, **settings)
        self.store = LocalStore(
            directories, build_gid=GID if users else None, reserve=False, durable=False
        )
        self.store.open()
        self.roots = self.store.temp_roots()
        if threads is None:
            pool = ThreadPool(0, 4)
            pool.start()
            case.addCleanup(pool.stop)
            threads = pool_threads(reactor, pool)
        self.launcher = launcher or ZygoteLauncher(reactor)
        self._threads, self._clock = threads, clock or reactor
        self._substitutes = substitutes
        self.engine = self.another_engine()
        case.addCleanup(self._close)
        self._shell: StorePath | None = None
        self._hashes: dict[StorePath, bytes] = {}

    def another_engine(self) -> Engine:
        """Return a new engine for the same store."""
        return Engine(
            self._clock,
            self.settings,
            self.store,
            self.launcher,
            self._threads,
            substitutes=self._substitutes,
        )

    async def _stop(self) -> None:
        await self.engine.stop()
        await self.launcher.stop()
        self.store.close()

    def _close(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._stop())

    @property
    def shell(self) -> StorePath:
        """A tree in the store with a static shell and some tools in `bin`."""
        if self._shell is None:
            tree = Path(self.top, "tools")
            tree.joinpath("bin").mkdir(parents=True)
            shutil.copy(BUSYBOX, tree / "bin" / "busybox")
            for tool in TOOLS:
                tree.joinpath("bin", tool).symlink_to("busybox")
            self._shell = self.tree(tree)
        return self._shell

    def tree(self, path: Path) -> StorePath:
        """Add the tree PATH without references."""
        addition = self.store.begin_addition(path.name, "sha256", True)
        dump(None, str(path), lambda block: addition.feed(bytes(block)))
        return self.store.commit_addition(addition, self.roots)

    def file(self, name: str, contents: bytes, *, executable: bool = False) -> StorePath:
        """Add a file without references."""
        addition = self.store.begin_addition(name, "sha256", True)
        addition.feed(nar_of_file(contents, executable))
        return self.store.commit_addition(addition, self.roots)

    def text(self, name: str, text: str, references: Collection[StorePath] = ()) -> StorePath:
        """Add a text."""
        return self.store.add_text(name, text.encode(), references, self.roots)

    def derive(
        self,
        name: str,
        script: str = "echo $name > $out",
        *,
        inputs: Mapping[StorePath, tuple[str, ...]] | Collection[StorePath] = (),
        sources: Collection[StorePath] = (),
        outputs: Collection[str] = ("out",),
        fixed: tuple[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        builder: str | None = None,
        platform: str | None = None,
    ) -> StorePath:
        """Add a derivation that runs SCRIPT in the shell.

        :param inputs: derivations, whose output `out` is meant unless others are given.
        :param fixed: algorithm, maybe with `r:`, and hexadecimal hash of the output.
        """
        if not isinstance(inputs, Mapping):
            inputs = dict.fromkeys(inputs, ("out",))
        algorithm, digest = fixed or ("", "")
        none = self.store.directory.child("0" * 32 + "-none")
        used = sorted({*sources, *([] if builder else [self.shell])})
        variables = {"name": name, "PATH": f"{self.shell}/bin", **(environment or {})}
        drv = Derivation(
            outputs={o: Output(none, algorithm, digest) for o in outputs},
            inputs=dict(inputs),
            sources=tuple(used),
            platform=platform or self.settings.system,
            builder=builder or f"{self.shell}/bin/sh",
            arguments=("-e", "-c", script),
            environment=variables,
        )
        paths = derivation.compute_output_paths(
            drv, name, self.store.directory, HashCache(self.store.read_derivation, self._hashes)
        )
        drv = replace(
            drv,
            outputs={o: Output(paths[o], algorithm, digest) for o in outputs},
            environment={**variables, **paths},
        )
        return self.text(
            name + ".drv", derivation.serialise(drv).decode(), [*drv.inputs, *drv.sources]
        )

    def output(self, drv: StorePath, name: str = "out") -> StorePath:
        """Return the path of an output of DRV."""
        return self.store.read_derivation(drv).outputs[name].path

    def build(
        self,
        *drvs: StorePath,
        observer: Recorder | None = None,
        mode: BuildMode = BuildMode.NORMAL,
        **options: Any,
    ) -> Deferred[None]:
        """Build all outputs of DRVS."""
        request = BuildRequest(
            tuple(Wanted(drv) for drv in drvs),
            mode,
            options=ClientOptions(**options),
            roots=self.roots,
        )
        return self.engine.build(request, observer or Recorder())

    def is_valid(self, drv: StorePath, name: str = "out") -> bool:
        """Whether an output of DRV is valid."""
        return self.store.is_valid(self.output(drv, name))

    async def check_fresh(self, case: TestCase, drv: StorePath) -> None:
        """Build DRV, which writes "x" to its output; nobody can write to that afterwards."""
        kept = []
        take = Harvest._take

        def keep_and_take(harvest: Harvest, path: StorePath) -> None:
            kept.append(os.open(path.base, os.O_WRONLY, dir_fd=harvest._source))
            case.addCleanup(os.close, kept[-1])
            take(harvest, path)

        case.patch(Harvest, "_take", keep_and_take)
        await self.build(drv)
        os.write(kept[0], b"evil")
        case.assertEqual(Path(self.output(drv)).read_text(), "x\n")

    def leftovers(self) -> list[str]:
        """Return what builds must not leave behind: trees, roots, locks, staging."""
        store = [n for n in os.listdir(self.store.directory.path) if ".chroot" in n]
        return store + os.listdir(self.settings.directories.temporary)


__all__ = ["Recorder", "TestCase", "World", "reactor"]


def processes() -> list[str]:
    """Return the processes of build users."""
    return processes_of((FIRST_UID, FIRST_UID + 1))
