"""One run of a builder, from its directories to the outputs that it left (spec: build §3, §8)."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any

from twisted.internet.error import ProcessTerminated
from twisted.logger import Logger
from twisted.python.failure import Failure

from guixd.build import container
from guixd.build.builder import Builder
from guixd.build.builtins import (
    BuiltinProcess,
    is_builtin,
    is_git_download,
    refuse_builtin,
    runs_here,
)
from guixd.build.cgroups import Group
from guixd.build.gitdownload import plan_checkout, plan_unpacking
from guixd.build.gitfallback import GitFallback
from guixd.build.graphs import VARIABLE as GRAPHS
from guixd.build.graphs import export_graphs
from guixd.build.job import Job
from guixd.build.launcher import LOST, BuilderLost
from guixd.build.outputs import Harvest
from guixd.build.program import NETWORK
from guixd.build.request import BuildMode, Level
from guixd.build.results import BuildFailure
from guixd.build.targets import Targets
from guixd.build.threads import inline
from guixd.build.uplink import NoUplink, connect
from guixd.build.users import BuildUser
from guixd.build.verdicts import builder_failed, full_disks, timed_out
from guixd.build.workshop import Workshop
from guixd.build.workspace import Kept, Workspace
from guixd.errors import GuixdError, SandboxError
from guixd.faults import reached
from guixd.formats.path import StorePath
from guixd.formats.trace import BuildStarted
from guixd.sandbox.spec import SandboxSpec
from guixd.store.links import Links
from guixd.store.trees import remove, remove_small

_log = Logger()

Finish = Callable[[Harvest], Awaitable[None]]
"""Does what the mode of the build says with outputs that can be taken in."""


class Trial:
    """One run.  `run` is called once.

    :param user: who runs the builder; `None` for the daemon's own user.
    :param again: returns what is to watch over another process in place of BUILDER's.
    :param last: whether no other follows, if this one ends well.
    """

    def __init__(
        self,
        workshop: Workshop,
        job: Job,
        builder: Builder,
        user: BuildUser | None,
        targets: Targets,
        *,
        again: Callable[[], Builder],
        last: bool = True,
    ) -> None:
        self._shop = workshop
        self._job = job
        self._builder = builder
        self._again = again
        self._user = user
        self._targets = targets
        self._last = last
        self._private = f"{job.path}.chroot"
        self._here = runs_here(job.drv)
        self._git = is_git_download(job.drv)
        self._contained = self._here or (workshop.settings.use_chroot and not self._git)
        self._process: BuiltinProcess | None = None
        self._group: Group | None = None
        self._fallback = ""
        self._finished = False

    async def run(self, finish: Finish) -> None:
        """Run the builder and give its outputs to FINISH; no directory is left afterwards.

        :raises BuildFailure: the builder failed, or its outputs are not as they should be.
        """
        shop, job, user = self._shop, self._job, self._user
        ready = self._git or (self._here and shop.builtins is not None)
        if is_builtin(job.drv) and not ready:
            refuse_builtin(job.drv)
        inputs = self._inputs()
        graphs = GRAPHS in job.drv.environment
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
        reached("build.prepared")
        try:
            if killing is not None:
                await killing
            job.interest.check()
            reason = await self._run_builder(workspace, inputs)
            if self._git and isinstance(reason.value, ProcessTerminated):
                reason = await self._fall_back(workspace, reason)
            await self._harvest(workspace, inputs, reason, finish)
            self._finished = True
        except (BuildFailure, GuixdError, OSError):
            keep = job.options.keep_failed
            raise
        finally:
            await self._clean_up(workspace, keep)

    # --- before ------------------------------------------------------------------

    def _inputs(self) -> frozenset[StorePath]:
        """Return the closure of all that the builder may use."""
        store, drv = self._shop.store, self._job.drv
        roots = set(drv.sources)
        for path, names in drv.inputs.items():
            outputs = store.derivation_outputs(path)
            roots.update(outputs[name] for name in names)
        return frozenset(store.database.closure(roots))

    def _graphs(self) -> dict[str, bytes]:
        """Return the files that the builder shall find; may be long."""
        drv, directory = self._job.drv, self._shop.store.directory
        return self._shop.with_queries(lambda queries: export_graphs(drv, directory, queries))()

    def _obstacles(self) -> list[str]:
        """Return what lies where the build is to make something; it may be large."""
        paths = (self._private, *self._targets.free, *self._targets.elsewhere.values())
        return [path for path in paths if os.path.lexists(path)]

    def _prepare(self, graphs: bool, obstacles: Iterable[str]) -> Workspace:
        """Make the directories and the log; short if there are no GRAPHS and OBSTACLES."""
        files = self._graphs() if graphs else {}
        for path in obstacles:
            remove(None, path)
        workspace = Workspace.create(
            self._job.path,
            temporary=self._shop.settings.directories.temporary,
            use_chroot=self._contained,
            user=self._user,
            files=files,
            plain=not self._contained and not self._git,
        )
        log = self._job.say.log_file
        if log is not None:
            log.open()
        return workspace

    def _spec(self, workspace: Workspace, inputs: frozenset[StorePath]) -> SandboxSpec:
        job, shop = self._job, self._shop
        return container.plan(
            self._targets.for_builder(job.drv),
            job.path,
            inputs,
            build_directory=workspace.build_directory,
            private=workspace.chroot,
            user=self._user,
            settings=shop.settings,
            cores=job.options.cores,
            host=shop.host,
        )

    # --- while the builder runs -----------------------------------------------------

    async def _start(self, workspace: Workspace, inputs: frozenset[StorePath]) -> Any:
        """Start the builder; return its transport."""
        job, shop, builder = self._job, self._shop, self._builder
        if self._here and shop.builtins is not None:
            assert workspace.store is not None
            directory = workspace.store
            parts = {path.hash_part for path in inputs | set(job.drv.output_paths)}
            self._process = shop.builtins.spawn(builder, job, directory, parts)
            return self._process
        if self._git:
            spec = plan_checkout(job, self._user, workspace.build_directory, shop.host)
        else:
            spec = self._spec(workspace, inputs)
        spec = self._limited(spec)
        if self._contained and job.drv.has_fixed_outputs:
            return await self._start_connected(spec)
        return await job.interest.wait(lambda: shop.launcher.spawn(builder, spec))

    async def _start_connected(self, spec: SandboxSpec) -> Any:
        """Start the builder of SPEC with a network, or without where there can be none."""
        job, shop, builder = self._job, self._shop, self._builder
        host, isolated = shop.host, shop.settings.isolate_host_loopback
        try:
            connected = await shop.threads(connect, spec, host.environment, host.machine, isolated)
            return await job.interest.wait(lambda: shop.launcher.spawn(builder, connected))
        except NoUplink as error:
            why = error.text
        except SandboxError as error:
            if error.phase != NETWORK:
                raise
            why = error.text
        # Nothing has been made yet in the directories.
        job.say.log(Level.ERROR, f"this build has no network: {why}")
        return await job.interest.wait(lambda: shop.launcher.spawn(builder, spec))

    def _limited(self, spec: SandboxSpec) -> SandboxSpec:
        """Return SPEC with the limits for this build."""
        if self._shop.cgroups is None:
            return spec
        self._group = self._group or self._shop.cgroups.begin()
        return replace(spec, cgroup=self._group.directory)

    async def _run_builder(self, workspace: Workspace, inputs: frozenset[StorePath]) -> Failure:
        """Run the builder to its end; return how it ended.

        :raises BuildFailure: a limit was broken (timed out).
        """
        job = self._job
        process = await self._start(workspace, inputs)
        log = job.say.log_file
        name = log.path if log is not None else ""
        started = BuildStarted(job.path, job.drv.platform, name, process.pid)
        job.say.begin(process.pid, started.line)
        return await self._see_through(self._builder, process)

    async def _see_through(self, builder: Builder, process: Any) -> Failure:
        """Watch over PROCESS until it ends; return how it ended, see `_run_builder`."""
        job = self._job
        builder.begin(process, self._user)
        reached("build.begun")
        if job.interest.lost:
            builder.kill()
        reason = await builder.end()
        reached("build.ended")
        job.interest.check()
        if builder.expired:
            raise timed_out(job.path, builder.expired)
        return reason

    async def _fall_back(self, workspace: Workspace, reason: Failure) -> Failure:
        """Get elsewhere what Git could not; return REASON if that does not work either."""
        shop, job = self._shop, self._job
        if shop.builtins is None:
            return reason

        async def unpack(archive: str) -> Failure:
            directory = workspace.build_directory
            spec = plan_unpacking(job, self._user, directory, shop.host, archive)
            builder, spec = self._again(), self._limited(spec)
            process = await job.interest.wait(lambda: shop.launcher.spawn(builder, spec))
            return await self._see_through(builder, process)

        private = self._private
        fallback = GitFallback(shop.builtins.tools, job, private, workspace.open_build, unpack)
        reason = await fallback.run(reason)
        self._fallback = fallback.directory
        return reason

    # --- after its end ----------------------------------------------------------------

    async def _harvest(
        self,
        workspace: Workspace,
        inputs: frozenset[StorePath],
        reason: Failure,
        finish: Finish,
    ) -> None:
        shop, job = self._shop, self._job
        store = shop.store.directory.path
        own = self._here or bool(self._fallback)  # made by the daemon itself
        harvest = Harvest(
            deriver=job.path,
            drv=job.drv,
            store=store,
            private=self._private,
            open_source=lambda: self._open_source(workspace),
            fresh=not own and (not self._contained or job.drv.has_fixed_outputs),
            owner=self._user.uid if self._user is not None and not own else None,
            targets=self._targets,
            candidates=inputs | set(job.drv.output_paths),
            links=self._links(),
            known=self._process.known if self._process is not None else {},
            check=job.interest.check,
        )
        if isinstance(reason.value, ProcessTerminated):
            full = full_disks(shop.settings.directories)
            # What filled the disk would go on doing so.
            if self._contained and (job.options.keep_failed or not full):
                with harvest:
                    await shop.threads(harvest.salvage)
            limit = self._group.verdict() if self._group is not None else ""
            if isinstance(reason.value, BuilderLost):
                limit = LOST
            raise builder_failed(job, reason.value, shop.settings, full, limit)
        try:
            with harvest:
                await finish(harvest)
            for note in harvest.links.notes if harvest.links is not None else ():
                job.say.log(Level.INFO, note)
        except BuildFailure:
            for wrong in harvest.mismatches:
                hashes = f"expected {wrong.algorithm} {wrong.expected}, actual {wrong.actual}"
                job.say.trace(wrong.line, hashes)
            raise

    def _open_source(self, workspace: Workspace) -> int:
        """Return a descriptor of the directory that has the outputs."""
        if self._fallback:
            return os.open(self._fallback, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._git:
            return workspace.open_build()
        return workspace.open_store(self._shop.store.directory.path)

    def _links(self) -> Links | None:
        """Return what shares files of outputs that are to be kept."""
        job = self._job
        if not job.options.deduplicate or not self._last or job.mode is BuildMode.CHECK:
            return None
        store = self._shop.store.directory.path
        return Links(store, distrust=job.mode is BuildMode.REPAIR)

    async def _end_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            try:
                await self._shop.threads(group.end)
            except OSError:
                _log.failure("cannot remove {group}", group=group.directory)

    async def _clean_up(self, workspace: Workspace, keep: bool) -> None:
        job = self._job
        await self._end_group()
        log = job.say.log_file
        if log is not None and self._ends:
            await log.settle()
        kept = None
        try:
            small = not keep and (log is None or log.is_small)
            if not (small and self._remove_small(workspace)):
                kept = await self._shop.threads(self._clean, workspace, keep)
        except (GuixdError, OSError) as error:
            if not self._finished:
                raise
            _log.error("cannot clean up after {path}: {error}", path=job.path, error=error)
            return
        if log is not None and log.problem and self._ends:
            text = f"the log `{log.path}' is not complete: {log.problem}"
            _log.error("{text}", text=text)
            job.say.log(Level.ERROR, text)
        if kept is not None:
            job.say.log(Level.ERROR, f"note: keeping build directory `{kept.path}'")
            if kept.problem:
                job.say.log(Level.ERROR, kept.problem)

    def _remove_small(self, workspace: Workspace) -> bool:
        """Do what `_clean` does, if that takes but a moment; return whether it is done."""
        bare = not self._contained
        if bare and (not self._finished or self._targets.elsewhere):
            return False  # Anything may lie where the outputs were to be.
        self._end_log()
        return workspace.remove_small() and (not bare or remove_small(None, self._private))

    def _clean(self, workspace: Workspace, keep: bool) -> Kept | None:
        """End the log and remove the directories, but for a tree to be kept; blocks."""
        options = self._job.options
        self._end_log()
        try:
            if keep:
                return workspace.keep(options.client_uid, options.client_gid)
            workspace.remove()
            return None
        finally:
            if not self._contained:
                remove(None, self._private)
                for path in self._targets.elsewhere.values():
                    remove(None, path)
                if not self._finished:
                    # They may have any mode; only in a container could they be hidden.
                    for path in self._targets.free:
                        remove(None, path)

    @property
    def _ends(self) -> bool:
        """Whether nothing more comes into the log."""
        return self._last or not self._finished

    def _end_log(self) -> None:
        log = self._job.say.log_file
        if log is not None and self._ends:
            log.end()
