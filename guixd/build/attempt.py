"""One attempt to build one derivation, from a free slot to valid outputs (build.md §3, §8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from twisted.internet.defer import CancelledError
from twisted.internet.task import deferLater

from guixd.build.builder import Builder
from guixd.build.constraints import check_references, has_rules
from guixd.build.foreign import released
from guixd.build.job import Job
from guixd.build.logs import LogFile, log_file
from guixd.build.outputs import Harvest, Made
from guixd.build.plan import BUSY_RETRY
from guixd.build.request import Level
from guixd.build.results import BuildFailure, Result, Status, result_of
from guixd.build.threads import inline
from guixd.build.trial import Trial
from guixd.build.users import BuildUser
from guixd.build.workshop import Workshop
from guixd.errors import Busy, GuixdError, ReferencesCycle
from guixd.faults import reached
from guixd.formats.derivation import Output
from guixd.formats.path import StorePath
from guixd.formats.trace import BuildFailed, BuildSucceeded, BuildTimedOut
from guixd.store.items import Registration
from guixd.store.locks import PathLocks
from guixd.store.trees import remove


class Attempt:
    """One build.  `run` is called once; `cancel` may be called at any time."""

    def __init__(self, workshop: Workshop, job: Job) -> None:
        self._shop = workshop
        self._job = job
        self._user: BuildUser | None = None
        self._contained = workshop.settings.use_chroot
        self._builder = Builder(
            workshop.launcher, job.say.output, job.patience, contained=self._contained
        )
        self._vacate: Callable[[], None] = lambda: None
        self._valid = False
        self._make_log()

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
        self._builder.hold(holder, on)

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
        path, say = self._job.path, self._job.say
        if result.status is Status.BUILT:
            say.trace(BuildSucceeded(path).line)
        elif not result.status.succeeded:
            say.log(Level.ERROR, result.text)
            if result.status is Status.TIMED_OUT:
                say.trace(BuildTimedOut(path).line)
            elif not result.general:
                code = 0 if result.status is Status.INPUT_REJECTED else 1
                say.trace(BuildFailed(path, code, result.text).line)

    async def _with_user(self) -> Result:
        if self._shop.users is not None:
            self._user = await self._job.interest.wait(self._shop.users.acquire)
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
            database = self._shop.store.database
            missing = {
                name: output
                for name, output in self._job.drv.outputs.items()
                if not database.is_valid(output.path)
            }
            if not missing:
                built = True
                return Result(Status.ALREADY_VALID)
            result = await self._build(missing)
            built = result.status.succeeded
            return result
        finally:
            locks.release(delete=built)

    async def _lock(self) -> PathLocks:
        """Take the lock files of all outputs; another process may have them for long."""
        job, told = self._job, False
        files = [path + ".lock" for path in job.drv.output_paths]
        while True:
            job.interest.check()
            locks = PathLocks.acquire(job.drv.output_paths)
            if locks is not None:
                return locks
            if not told:
                told = True
                job.say.log(Level.ERROR, f"waiting for locks on the outputs of `{job.path}'")
            await job.interest.wait(lambda: released(self._shop.reactor, files))

    async def _pause(self, seconds: float) -> None:
        await self._job.interest.wait(lambda: deferLater(self._shop.reactor, seconds))

    async def _build(self, missing: Mapping[str, Output]) -> Result:
        names = ", ".join(f"`{output.path}'" for _, output in sorted(missing.items()))
        self._job.say.log(Level.INFO, f"building path(s) {names}")
        await Trial(self._shop, self._job, self._builder, self._user, missing).run(self._finish)
        return Result(Status.BUILT)

    # --- what becomes of the outputs ----------------------------------------------

    async def _finish(self, harvest: Harvest) -> None:
        """Make the outputs valid."""
        made = await self._take_in(harvest)
        try:
            reached("build.published")
            await self._register(made)
            reached("build.registered")
        except BaseException:
            await self._shop.threads(_remove_all, [output.path for output in made])
            raise
        self._valid = True
        self._make_room()

    async def _take_in(self, harvest: Harvest) -> tuple[Made, ...]:
        """Put the outputs in place if they are as they should be."""
        store, drv = self._shop.store, self._job.drv
        call = inline if harvest.is_small() else self._shop.threads
        if not has_rules(drv):
            return await call(harvest.take_in)
        made = await call(harvest.collect)
        references = {output.path: output.references for output in made}
        check_references(drv, store.directory, references, store.database.closure)
        await call(harvest.publish, made)
        return made

    async def _register(self, made: tuple[Made, ...]) -> None:
        items = [
            Registration(
                output.path, output.nar_hash, output.nar_size, output.references, self._job.path
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


def _remove_all(paths: list[StorePath]) -> None:
    for path in paths:
        remove(None, path)
