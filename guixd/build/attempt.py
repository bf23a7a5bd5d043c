"""One attempt to build one derivation, from a free slot to valid outputs (build.md §3, §8)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ProcessTerminated
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from guixd.build import container
from guixd.build.broadcast import Broadcast
from guixd.build.builder import Builder, Launcher
from guixd.build.builtins import is_builtin, refuse_builtin
from guixd.build.constraints import check_references, export_graphs, has_rules
from guixd.build.logs import LogFile, log_file
from guixd.build.outputs import Harvest, Made
from guixd.build.plan import BUSY_RETRY
from guixd.build.request import ClientOptions, Level
from guixd.build.results import BuildFailure, Result, Status, result_of
from guixd.build.threads import Threads, inline
from guixd.build.users import BuildUser, BuildUserPool
from guixd.build.workspace import Kept, Workspace
from guixd.errors import Busy, GuixdError, ReferencesCycle
from guixd.formats.derivation import Derivation
from guixd.formats.path import StorePath
from guixd.formats.trace import BuildFailed, BuildStarted, BuildSucceeded, BuildTimedOut
from guixd.sandbox.spec import SandboxSpec
from guixd.settings import Settings
from guixd.store.items import Registration
from guixd.store.local import LocalStore
from guixd.store.locks import PathLocks
from guixd.store.trees import remove

_log = Logger()
_T = TypeVar("_T")

LOCK_RETRY = 1.0
"""Seconds until an output that another process holds is tried again."""
DISK_FULL = 8 << 20
"""Free bytes below which a failure is put down to the disk."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every attempt uses."""

    reactor: IReactorTime
    threads: Threads
    settings: Settings
    store: LocalStore
    launcher: Launcher
    users: BuildUserPool | None
    """`None` if builders run as the daemon's own user."""
    host: container.Host

    def all_valid(self, drv: Derivation) -> bool:
        """Whether DRV has nothing left to build."""
        return all(self.store.database.is_valid(path) for path in drv.output_paths)


class Attempt:
    """One build.  `run` is called once; `cancel` may be called at any time."""

    def __init__(
        self,
        workshop: Workshop,
        path: StorePath,
        drv: Derivation,
        options: ClientOptions,
        broadcast: Broadcast,
    ) -> None:
        self._shop = workshop
        self._path = path
        self._drv = drv
        self._options = options
        self._broadcast = broadcast
        self._cancelled = False
        self._waiting: Deferred[Any] | None = None
        self._private = f"{path}.chroot"
        self._user: BuildUser | None = None
        self._contained = workshop.settings.use_chroot
        self._builder = Builder(
            workshop.reactor, workshop.launcher, broadcast.output, contained=self._contained
        )
        self._vacate: Callable[[], None] = lambda: None
        self._valid = False
        self._missing = dict(drv.outputs)
        self._make_log()

    def _make_log(self) -> None:
        shop = self._shop
        if shop.settings.keep_log:
            compression = shop.settings.log_compression
            self._broadcast.log_file = LogFile(
                shop.reactor,
                shop.threads,
                log_file(shop.settings.directories.log, self._path, compression),
                compression,
                lambda room: self.hold("log", not room),
            )

    # --- control from outside ---------------------------------------------------

    def cancel(self) -> None:
        """Give the build up: it ends as soon as nothing of it is left."""
        self._cancelled = True
        if self._waiting is not None:
            self._waiting.cancel()
        self._builder.kill()

    def hold(self, holder: str, on: bool) -> None:
        """Stop or resume reading what the builder writes; each HOLDER counts once."""
        self._builder.hold(holder, on)

    async def _wait(self, start: Callable[[], Deferred[_T]]) -> _T:
        """Wait for what START begins, which may be given up in the middle."""
        self._check()
        self._waiting = waiting = start()
        try:
            return await waiting
        finally:
            self._waiting = None

    def _check(self) -> None:
        if self._cancelled:
            raise CancelledError

    # --- the build ---------------------------------------------------------------

    async def run(self, vacate: Callable[[], None]) -> Result:
        """Build; afterwards no process, mount or directory of the build is left.

        :param vacate: called once, as soon as another build may begin in place of
            this one: when only directories are left to be removed, at the latest at
            the end.
        :raises CancelledError: it was given up.
        """
        self._vacate = vacate
        try:
            result = await self._with_user()
        except CancelledError:
            raise
        except (BuildFailure, GuixdError, OSError) as error:
            result = result_of(error)
        finally:
            self._make_room()
        self._report(result)
        return result

    def _report(self, result: Result) -> None:
        say = self._broadcast
        if result.status is Status.BUILT:
            say.trace(BuildSucceeded(self._path).line)
        elif not result.status.succeeded:
            say.log(Level.ERROR, result.text)
            if result.status is Status.TIMED_OUT:
                say.trace(BuildTimedOut(self._path).line)
            elif not result.general:
                code = 0 if result.status is Status.INPUT_REJECTED else 1
                say.trace(BuildFailed(self._path, code, result.text).line)

    async def _with_user(self) -> Result:
        if self._shop.users is not None:
            self._user = await self._wait(self._shop.users.acquire)
        return await self._with_locks()

    def _make_room(self) -> None:
        """Let another build have the user and the slot."""
        user, self._user = self._user, None
        if user is not None and self._shop.users is not None:
            # With valid outputs, its pid namespace has ended in good order.
            self._shop.users.release(user, clean=self._contained and self._valid)
        vacate, self._vacate = self._vacate, lambda: None
        vacate()

    async def _with_locks(self) -> Result:
        locks = await self._lock()
        built = False
        try:
            store = self._shop.store
            self._missing = {
                name: output
                for name, output in self._drv.outputs.items()
                if not store.database.is_valid(output.path)
            }
            if not self._missing:
                built = True
                return Result(Status.ALREADY_VALID)
            result = await self._build()
            built = result.status.succeeded
            return result
        finally:
            locks.release(delete=built)

    async def _lock(self) -> PathLocks:
        """Take the lock files of all outputs; another process may have them for long."""
        told = False
        while True:
            self._check()
            locks = PathLocks.acquire(self._drv.output_paths)
            if locks is not None:
                return locks
            if not told:
                told = True
                self._broadcast.log(
                    Level.ERROR, f"waiting for locks on the outputs of `{self._path}'"
                )
            await self._pause(LOCK_RETRY)

    async def _pause(self, seconds: float) -> None:
        await self._wait(lambda: deferLater(self._shop.reactor, seconds))

    async def _build(self) -> Result:
        """Build what is missing, in a workspace that is gone afterwards."""
        shop, user = self._shop, self._user
        self._broadcast.log(Level.INFO, f"building path(s) {self._names()}")
        if is_builtin(self._drv):
            refuse_builtin(self._drv)
        inputs = self._inputs()
        graphs = self._graphs()
        killing = None
        if user is not None and shop.users is not None and not shop.users.is_clean(user):
            killing = shop.launcher.kill_user(user.uid)
        obstacles = self._obstacles()
        call = shop.threads if graphs or obstacles else inline
        try:
            workspace = await call(self._prepare, graphs, obstacles)
        except BaseException:
            if killing is not None:
                await killing
            raise
        keep = False
        try:
            if killing is not None:
                await killing
            self._check()
            reason = await self._run_builder(self._spec(workspace, inputs))
            await self._harvest(workspace, inputs, reason)
            self._valid = True
            self._make_room()
            return Result(Status.BUILT)
        except (BuildFailure, GuixdError, OSError):
            keep = self._options.keep_failed
            raise
        finally:
            await self._clean_up(workspace, keep)

    async def _clean_up(self, workspace: Workspace, keep: bool) -> None:
        log = self._broadcast.log_file
        if log is not None:
            await log.settle()
        try:
            if not keep and self._contained and (log is None or log.is_small):
                self._end_log()
                if workspace.remove_small():
                    return
            kept = await self._shop.threads(self._clean, workspace, keep)
        except (GuixdError, OSError):
            if not self._valid:
                raise
            _log.failure("cannot clean up after {path}", path=self._path)
            return
        if kept is not None:
            self._broadcast.log(Level.ERROR, f"keeping build directory `{kept.path}'")
            if kept.problem:
                self._broadcast.log(Level.ERROR, kept.problem)

    def _names(self) -> str:
        return ", ".join(f"`{output.path}'" for _, output in sorted(self._missing.items()))

    def _inputs(self) -> frozenset[StorePath]:
        """Return the closure of all that the builder may use."""
        roots = set(self._drv.sources)
        for path, names in self._drv.inputs.items():
            outputs = self._shop.store.derivation_outputs(path)
            roots.update(outputs[name] for name in names)
        return frozenset(self._shop.store.database.closure(roots))

    def _graphs(self) -> dict[str, str]:
        if "exportReferencesGraph" not in self._drv.environment:
            return {}
        store = self._shop.store
        database = store.database
        return export_graphs(
            self._drv,
            store.directory,
            database.is_valid,
            lambda path: database.path_info(path).references,
            database.closure,
            store.read_derivation,
        )

    def _obstacles(self) -> list[str]:
        """Return what lies where the build is to make something; it may be large."""
        paths = (self._private, *(output.path for output in self._missing.values()))
        return [path for path in paths if os.path.lexists(path)]

    def _prepare(self, graphs: dict[str, str], obstacles: Iterable[str]) -> Workspace:
        """Make the directories and the log; short if there are no GRAPHS and OBSTACLES."""
        for path in obstacles:
            remove(None, path)
        workspace = Workspace.create(
            self._path,
            temporary=self._shop.settings.directories.temporary,
            use_chroot=self._contained,
            user=self._user,
            files={name: text.encode() for name, text in graphs.items()},
        )
        log = self._broadcast.log_file
        if log is not None:
            try:
                log.open()
            except OSError:
                _log.failure("cannot keep the log {path}", path=log.path)
        return workspace

    def _clean(self, workspace: Workspace, keep: bool) -> Kept | None:
        """End the log and remove the directories, but for a tree to be kept; blocks."""
        self._end_log()
        try:
            if keep:
                return workspace.keep(self._options.client_uid, self._options.client_gid)
            workspace.remove()
            return None
        finally:
            if not self._contained:
                remove(None, self._private)
                if not self._valid:
                    # They may have any mode; only in a container could they be hidden.
                    _remove_all(output.path for output in self._missing.values())

    def _end_log(self) -> None:
        log = self._broadcast.log_file
        if log is not None:
            try:
                log.end()
            except OSError:
                _log.failure("cannot end the log {path}", path=log.path)

    def _spec(self, workspace: Workspace, inputs: frozenset[StorePath]) -> SandboxSpec:
        if self._contained and self._drv.has_fixed_outputs:
            self._broadcast.log(Level.ERROR, container.NO_NETWORK)
        return container.plan(
            self._drv,
            self._path,
            inputs,
            build_directory=workspace.build_directory,
            root=workspace.root,
            user=self._user,
            settings=self._shop.settings,
            cores=self._options.cores,
            host=self._shop.host,
        )

    # --- after the builder's end ------------------------------------------------------

    async def _harvest(
        self, workspace: Workspace, inputs: frozenset[StorePath], reason: Failure
    ) -> None:
        """Make the outputs valid.

        :raises BuildFailure: the builder failed, or its outputs are not as they should be.
        """
        shop, store = self._shop, self._shop.store
        contained = self._contained
        harvest = Harvest(
            drv=self._drv,
            store=store.directory.path,
            private=self._private,
            open_source=lambda: workspace.open_store(store.directory.path),
            fresh=not contained or self._drv.has_fixed_outputs,
            owner=self._user.uid if self._user is not None else None,
            wanted=self._missing,
            candidates=inputs | set(self._drv.output_paths),
        )
        if isinstance(reason.value, ProcessTerminated):
            if contained:
                with harvest:
                    await shop.threads(harvest.salvage)
            raise self._builder_failed(reason.value)
        try:
            with harvest:
                made = await self._take_in(harvest)
        except BuildFailure:
            for line in harvest.mismatches:
                self._broadcast.trace(line)
            raise
        try:
            await self._register(made)
        except BaseException:
            await shop.threads(_remove_all, [output.path for output in made])
            raise

    async def _take_in(self, harvest: Harvest) -> tuple[Made, ...]:
        """Put the outputs in place if they are as they should be."""
        store = self._shop.store
        call = inline if harvest.is_small() else self._shop.threads
        if not has_rules(self._drv):
            return await call(harvest.take_in)
        made = await call(harvest.collect)
        references = {output.path: output.references for output in made}
        check_references(self._drv, store.directory, references, store.database.closure)
        await call(harvest.publish, made)
        return made

    async def _register(self, made: tuple[Made, ...]) -> None:
        items = [
            Registration(
                output.path, output.nar_hash, output.nar_size, output.references, self._path
            )
            for output in made
        ]
        while True:
            try:
                self._shop.store.register(items)
            except Busy:  # another process writes at this moment
                await self._pause(BUSY_RETRY)
            except ReferencesCycle as error:
                raise BuildFailure(Status.OUTPUT_REJECTED, error.text) from None
            else:
                return

    def _builder_failed(self, reason: ProcessTerminated) -> BuildFailure:
        if reason.signal is not None:
            name = signal.strsignal(reason.signal) or "unknown"
            end = f"failed due to signal {reason.signal} ({name})"
        else:
            end = f"failed with exit code {reason.exitCode}"
        directories = self._shop.settings.directories
        full = any(_disk_is_full(path) for path in (directories.store, directories.temporary))
        if full:
            self._broadcast.log(
                Level.ERROR, "the disk is nearly full, which may be why the build failed"
            )
        transient = full or self._drv.has_fixed_outputs
        return BuildFailure(
            Status.TRANSIENT_FAILURE if transient else Status.PERMANENT_FAILURE,
            f"builder for `{self._path}' {end}",
        )

    # --- while the builder runs -----------------------------------------------------

    async def _run_builder(self, spec: SandboxSpec) -> Failure:
        """Run the builder to its end; return how it ended.

        :raises BuildFailure: a limit was broken (timed out).
        """
        builder, spawn = self._builder, self._shop.launcher.spawn
        process = await self._wait(lambda: spawn(builder, spec))
        self._broadcast.begin(process.pid)
        log = self._broadcast.log_file
        name = log.path if log is not None else ""
        self._broadcast.trace(BuildStarted(self._path, self._drv.platform, name, process.pid).line)
        builder.begin(process, self._user, self._options)
        if self._cancelled:
            builder.kill()
        reason = await builder.end()
        self._check()
        if builder.expired:
            raise BuildFailure(Status.TIMED_OUT, f"build of `{self._path}' {builder.expired}")
        return reason


def _disk_is_full(path: str) -> bool:
    free = os.statvfs(path)
    return free.f_bavail * free.f_frsize < DISK_FULL


def _remove_all(paths: Iterable[StorePath]) -> None:
    for path in paths:
        remove(None, path)
