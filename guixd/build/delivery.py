"""What becomes of the outputs of one run, as the mode of the build says (spec: build §6, §8)."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from guixd.build.constraints import check_references, has_rules
from guixd.build.job import Job
from guixd.build.outputs import CHECK, Harvest, Made
from guixd.build.results import BuildFailure, Status
from guixd.build.threads import inline
from guixd.build.workshop import Workshop
from guixd.errors import ReferencesCycle
from guixd.faults import reached
from guixd.formats.path import StorePath
from guixd.formats.trace import BuildSucceeded
from guixd.store.items import Registration
from guixd.store.trees import remove

DIFFOSCOPE = "`diffoscope' shows in what two trees differ"


class Delivery:
    """The way of outputs from a `Harvest` to where they belong."""

    def __init__(self, workshop: Workshop, job: Job) -> None:
        self._shop = workshop
        self._job = job
        self._before: dict[StorePath, Made] = {}
        self._aside: list[StorePath] = []

    async def keep(self, harvest: Harvest) -> None:
        """Make the outputs valid, all or none of them.

        :raises BuildFailure: they are not as they should be, or not as in the round before.
        """
        call = inline if harvest.is_small() else self._shop.threads
        if has_rules(self._job.drv) or self._before:
            made = await self._collect(harvest)
            await self._compare_rounds(made)
            await call(harvest.publish, made)
        else:
            made = await call(harvest.take_in)
        try:
            reached("build.published")
            await self._register(made)
            reached("build.registered")
        except BaseException:
            await self._shop.threads(_remove_all, [output.path for output in made])
            raise
        if self._aside:
            await self._shop.threads(_remove_all, self._aside)

    async def compare(self, harvest: Harvest) -> None:
        """Remember what a round made, which must be what the one before it made.

        :raises BuildFailure: it is not, or not as it should be.
        """
        made = await self._collect(harvest)
        await self._compare_rounds(made)
        self._before = {output.path: output for output in made}
        if self._job.options.keep_failed:
            await self._set_aside(harvest, self._before)

    async def check(self, harvest: Harvest) -> None:
        """Compare with the valid outputs.

        :raises BuildFailure: they are not the same.
        """
        made = await self._shop.threads(harvest.collect)
        database = self._shop.store.database
        for output in made:
            if database.path_info(output.path).nar_hash == output.nar_hash:
                self._job.say.trace(BuildSucceeded(self._job.path).line)
                continue
            path = output.path
            text = f"derivation `{self._job.path}' may not be deterministic: building it again"
            if self._job.options.keep_failed:
                await self._set_aside(harvest, [path])
                text += f" made `{path}{CHECK}', which is not the same as `{path}'"
                text += f"; {DIFFOSCOPE}"
            else:
                text += f" gave another `{path}'; use `--keep-failed' to keep that, too"
            raise BuildFailure(Status.MISC_FAILURE, text, general=True)

    async def repair(self, harvest: Harvest) -> None:
        """Put the outputs in place of those that are broken or missing.

        :raises BuildFailure: they are not as they should be.
        """
        made = await self._collect(harvest)
        await self._shop.threads(harvest.replace, made)
        reached("repair.replaced")
        await self._register(made)
        reached("repair.registered")

    # --- steps -------------------------------------------------------------------

    async def _collect(self, harvest: Harvest) -> tuple[Made, ...]:
        store, drv = self._shop.store, self._job.drv
        call = inline if harvest.is_small() else self._shop.threads
        made = await call(harvest.collect)
        if has_rules(drv):
            references = {output.path: output.references for output in made}
            await self._shop.threads(
                self._shop.with_queries(
                    lambda queries: check_references(
                        drv, store.directory, references, queries, harvest.locate
                    )
                )
            )
        return made

    async def _compare_rounds(self, made: Collection[Made]) -> None:
        for output in made:
            before = self._before.get(output.path, output)
            if (before.nar_hash, before.references) == (output.nar_hash, output.references):
                continue
            text = (
                f"output `{output.path}' of `{self._job.path}' differs from previous round,"
                " so the derivation may not be deterministic"
            )
            if self._job.options.keep_failed:
                text += f"; that one is `{output.path}{CHECK}'"
                advice = DIFFOSCOPE
            else:
                advice = "`--keep-failed' keeps what differs, to be looked at"
            raise BuildFailure(Status.OUTPUT_REJECTED, text, advice)

    async def _set_aside(self, harvest: Harvest, paths: Collection[StorePath]) -> None:
        await self._shop.threads(harvest.set_aside, paths)
        store = self._shop.store.directory
        self._aside = [store.child(path.base + CHECK) for path in paths]

    async def _register(self, made: Iterable[Made]) -> None:
        items = [
            Registration(
                output.path, output.nar_hash, output.nar_size, output.references, self._job.path
            )
            for output in made
        ]
        shop = self._shop
        try:
            await shop.when_free(self._job.interest, lambda: shop.store.register(items))
        except ReferencesCycle as error:
            raise BuildFailure(Status.OUTPUT_REJECTED, error.text) from None


def _remove_all(paths: Iterable[StorePath]) -> None:
    for path in paths:
        remove(None, path)
