"""One attempt to build one derivation, from a free slot to valid outputs (spec: build §3, §8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from twisted.internet.defer import CancelledError, Deferred

from guixd.build.builder import Builder
from guixd.build.builtins import is_git_download, runs_here
from guixd.build.contents import is_intact
from guixd.build.delivery import Delivery
from guixd.build.job import Job
from guixd.build.logs import LogFile, log_file
from guixd.build.outputs import Harvest
from guixd.build.plan import failed_before
from guixd.build.request import BuildMode, Level
from guixd.build.results import BuildFailure, Result, Status, result_of
from guixd.build.targets import Targets, targets
from guixd.build.trial import Finish, Trial
from guixd.build.users import BuildUser, BuildUserPool
from guixd.build.workshop import Workshop
from guixd.errors import GuixdError
from guixd.formats.derivation import Output
from guixd.formats.path import StorePath
from guixd.formats.trace import BuildFailed, BuildFailedBefore, BuildSucceeded, BuildTimedOut
from guixd.store.locks import PathLocks


class Attempt:
    """One build.  `run` is called once; `cancel` may be called at any time."""

    def __init__(self, workshop: Workshop, job: Job) -> None:
        self._shop = workshop
        self._job = job
        self._user: BuildUser | None = None
        self._mode = job.mode
        self._here = runs_here(job.drv)
        self._git = is_git_download(job.drv)
        self._contained = self._here or (workshop.settings.use_chroot and not self._git)
        self._holders: set[str] = set()
        self._builder = self._make_builder()
        self._vacate: Callable[[], None] = lambda: None
        self._valid = False
        self._make_log()

    def _make_builder(self) -> Builder:
        shop = self._shop
        builder = Builder(
            shop.launcher,
            self._job.say.output,
            self._job.patience,
            contained=self._contained,
        )
        for holder in self._holders:
            builder.hold(holder, True)
        return builder

    def _again(self) -> Builder:
        """Return what watches over another process, in place of the one before."""
        self._builder = self._make_builder()
        return self._builder

    def _make_log(self) -> None:
        shop, job = self._shop, self._job
        if shop.settings.keep_log:
            compression = shop.settings.log_compression
            job.say.log_file = LogFile(
                shop.reactor,
                shop.threads,
                log_file(shop.settings.directories.log, job.path, compression),
                compression,
                lambda room: self.hold("log", not room),
            )

    # --- control from outside ---------------------------------------------------

    def cancel(self) -> None:
        """Give the build up: it ends as soon as nothing of it is left."""
        self._job.interest.lose()
        self._builder.kill()

    def hold(self, holder: str, on: bool) -> None:
        """Stop or resume reading what the builder writes; each HOLDER counts once."""
        (self._holders.add if on else self._holders.discard)(holder)
        self._builder.hold(holder, on)

    # --- the build ---------------------------------------------------------------

    async def run(self, vacate: Callable[[], None]) -> Result | None:
        """Build; afterwards no process, mount or directory of the build is left.

        Nothing is done, and `None` returned, if another process has the lock of an output.

        :param vacate: called before the end if another build may begin in place of
            this one: when only directories are left to be removed.
        :raises CancelledError: it was given up.
        """
        self._vacate = vacate
        try:
            result = await self._with_user()
        except CancelledError:
            raise
        except (BuildFailure, GuixdError, OSError) as error:
            result = result_of(error)
            if isinstance(error, OSError):
                result = replace(result, text=f"cannot build `{self._job.path}': {result.text}")
            await self._remember(result)
        finally:
            self._release_user()
        if result is not None:
            self._report(result)
        return result

    async def _remember(self, failure: Result) -> None:
        """Note that the build fails for good, if that is wanted (spec: store §15)."""
        drv = self._job.drv
        final = failure.status in (Status.PERMANENT_FAILURE, Status.OUTPUT_REJECTED)
        normal = self._mode is BuildMode.NORMAL
        if final and normal and self._shop.settings.cache_failures and not drv.has_fixed_outputs:
            paths, database = sorted(drv.output_paths), self._shop.store.database
            await self._shop.when_free(self._job.interest, lambda: database.add_failed(paths))

    def _report(self, result: Result) -> None:
        path, say = self._job.path, self._job.say
        if result.status is Status.BUILT:
            say.trace(BuildSucceeded(path).line)
        elif not result.status.succeeded:
            if not result.general:  # else it is the text of the request's error
                say.log(Level.ERROR, result.message)
                if result.status.of_builder:
                    say.recall(lines=result.in_log)
            if result.status is Status.CACHED_FAILURE:
                say.trace(BuildFailedBefore(path).line)
            elif result.status is Status.TIMED_OUT:
                say.trace(BuildTimedOut(path).line)
            elif not result.general:
                code = 0 if result.status is Status.INPUT_REJECTED else 1
                say.trace(BuildFailed(path, code, result.text).line)

    async def _with_user(self) -> Result | None:
        users = self._shop.users
        if users is not None and not self._here:
            self._user = await self._job.interest.wait(lambda: self._acquire(users))
        return await self._with_locks()

    def _acquire(self, users: BuildUserPool) -> Deferred[BuildUser]:
        job, user = self._job, users.acquire()
        if not user.called:
            text = f"the build of `{job.path}' waits for a build user: other processes use all"
            job.say.log(Level.ERROR, text)
        return user

    def _release_user(self) -> None:
        """Let another build have the user."""
        user, self._user = self._user, None
        if user is not None and self._shop.users is not None:
            # With valid outputs, all has been killed, or a pid namespace has ended in good order.
            self._shop.users.release(user, clean=self._valid)

    async def _with_locks(self) -> Result | None:
        locks = PathLocks.acquire(self._job.drv.output_paths)
        if locks is None:
            return None
        valid = self._mode is BuildMode.CHECK
        try:
            wanted = await self._wanted()
            if not wanted:
                valid = True
                return Result(Status.ALREADY_VALID)
            self._check_failures(wanted)
            await self._build(wanted)
            valid = True
            return Result(Status.BUILT)
        finally:
            locks.release(delete=valid)

    async def _wanted(self) -> dict[str, Output]:
        """Return the outputs that are to be made."""
        outputs = self._job.drv.outputs
        if self._mode is BuildMode.CHECK:
            return dict(outputs)
        database = self._shop.store.database
        missing = {n: o for n, o in outputs.items() if not database.is_valid(o.path)}
        if self._mode is BuildMode.REPAIR:
            for name, output in outputs.items():
                if name not in missing:
                    expected = database.path_info(output.path).nar_hash
                    if not await self._is_intact(output.path, expected):
                        missing[name] = output
        return missing

    async def _is_intact(self, path: StorePath, nar_hash: bytes) -> bool:
        reading = partial(is_intact, self._shop.threads, path, nar_hash)
        return await self._job.interest.wait(lambda: Deferred.fromCoroutine(reading()))

    def _check_failures(self, wanted: Mapping[str, Output]) -> None:
        """Refuse to build what failed meanwhile, if failures are remembered."""
        if self._mode is BuildMode.NORMAL and self._shop.settings.cache_failures:
            database = self._shop.store.database
            if any(database.has_failed(output.path) for output in wanted.values()):
                raise BuildFailure(Status.CACHED_FAILURE, failed_before(self._job.path))

    async def _build(self, wanted: Mapping[str, Output]) -> None:
        shop, job = self._shop, self._job
        names = ", ".join(f"`{output.path}'" for _, output in sorted(wanted.items()))
        job.say.log(Level.INFO, f"building path(s) {names}")
        normal = self._mode is BuildMode.NORMAL
        outputs = job.drv.outputs.items()
        taken = [output.path for name, output in outputs if not normal or name not in wanted]
        apart = self._contained or self._git
        where = targets(shop.store.directory, job.path, wanted, taken, contained=apart)
        own = shop.store.temp_roots() if where.elsewhere else None
        try:
            for path in where.elsewhere.values():
                assert own is not None
                await shop.when_free(job.interest, partial(own.add, path))
            await self._rounds(where)
        finally:
            if own is not None:
                own.close()

    async def _rounds(self, where: Targets) -> None:
        repeats = self._mode is not BuildMode.REPAIR and not self._job.drv.has_fixed_outputs
        rounds = self._job.options.rounds if repeats else 1
        delivery = Delivery(self._shop, self._job)
        for number in range(1, rounds + 1):
            last = number == rounds
            if number > 1:
                self._again()
            finish = self._finish_of(delivery, last)
            trial = Trial(
                self._shop,
                self._job,
                self._builder,
                self._user,
                where,
                again=self._again,
                last=last,
            )

            async def finish_and_make_room(
                harvest: Harvest, finish: Finish = finish, last: bool = last
            ) -> None:
                await finish(harvest)
                if last:
                    self._valid = True
                    self._release_user()
                    self._vacate()

            await trial.run(finish_and_make_room)

    def _finish_of(self, delivery: Delivery, last: bool) -> Finish:
        if self._mode is BuildMode.CHECK:
            return delivery.check
        if self._mode is BuildMode.REPAIR:
            return delivery.repair
        return delivery.keep if last else delivery.compare
