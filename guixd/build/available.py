"""What of a request need not be built, as there are substitutes (spec: build §3, substitutes §8).

Servers are asked for many paths at a time: for all outputs that are wanted first, then,
where something is missing, for all that its builds need, and so on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from twisted.internet.interfaces import IReactorTime

from guixd.build.broadcast import Observer
from guixd.build.contents import read_derivation
from guixd.build.request import ClientOptions, Wanted
from guixd.build.substitutes import Substitutes
from guixd.build.threads import Threads
from guixd.build.turns import Turns
from guixd.errors import GuixdError
from guixd.formats.derivation import Derivation
from guixd.formats.path import StorePath
from guixd.net.narinfos import Offer
from guixd.store.local import LocalStore


@dataclass(slots=True)
class Available:
    """What can be substituted with all that it refers to.

    :ivar depths: how long the longest chain of references below each is.
    :ivar incomplete: what is offered, too, but refers to something that is not there.
    """

    offers: dict[StorePath, Offer] = field(default_factory=dict)
    depths: dict[StorePath, int] = field(default_factory=dict)
    incomplete: frozenset[StorePath] = frozenset()


class Search:
    """Finds what is available for one request.

    :param but: paths that could not be had although they were offered.
    """

    def __init__(
        self,
        clock: IReactorTime,
        threads: Threads,
        store: LocalStore,
        substitutes: Substitutes,
        options: ClientOptions,
        observer: Observer,
        but: Collection[StorePath] = (),
    ) -> None:
        self._clock = clock
        self._threads = threads
        self._store = store
        self._substitutes = substitutes
        self._options = options
        self._observer = observer
        self._open: dict[StorePath, Offer] = {}  # offered, but something it needs is not
        self._asked: set[StorePath] = set(but)
        self._seen: set[tuple[StorePath, frozenset[str]]] = set()
        self.available = Available()

    async def run(self, wanted: Iterable[Wanted]) -> Available:
        """Return what is available of WANTED, and of what must be built for it."""
        turns = Turns(self._clock)
        wanted = tuple(wanted)
        frontier = [(want.path, want.outputs or frozenset()) for want in wanted if want.is_build]
        plain = {want.path for want in wanted}
        while frontier or plain:
            reads = []
            for path, names in frontier:
                drv = await self._read(path, names)
                if drv is not None:
                    reads.append((drv, self._missing(drv, names)))
                await turns.give()
            asked = plain.union(*(missing for drv, missing in reads if _may_substitute(drv)))
            await self._ask(path for path in asked if not self._is_valid(path))
            frontier, plain = [], set()
            for drv, missing in reads:
                if missing and not (
                    _may_substitute(drv) and missing <= self.available.offers.keys()
                ):
                    frontier += [(path, frozenset(names)) for path, names in drv.inputs.items()]
                    plain.update(drv.sources)
                    plain.update(drv.inputs)
                await turns.give()
            plain = {path for path in plain if path not in self._asked and not self._is_valid(path)}
        self.available.incomplete = frozenset(self._open)
        return self.available

    def _is_valid(self, path: StorePath) -> bool:
        return self._store.database.is_valid(path)

    async def _read(self, path: StorePath, names: frozenset[str]) -> Derivation | None:
        """Return the derivation PATH, unless it cannot be read or was looked at before."""
        if (path, names) in self._seen:
            return None
        self._seen.add((path, names))
        if not self._is_valid(path):
            return None
        try:
            return await read_derivation(self._threads, self._store, path)
        except (GuixdError, OSError):
            return None  # whoever plans the builds tells why

    def _missing(self, drv: Derivation, names: frozenset[str]) -> set[StorePath]:
        """Return the outputs of DRV that are wanted and not valid."""
        return {
            output.path
            for name, output in drv.outputs.items()
            if (name in names or not names) and not self._is_valid(output.path)
        }

    async def _ask(self, paths: Iterable[StorePath]) -> None:
        """Ask for PATHS, and for what they refer to."""
        ask = {path for path in paths if path not in self._asked}
        if not ask:
            return
        while ask:
            self._asked |= ask
            offers = await self._substitutes.find(ask, self._options, self._observer)
            self._open.update(offers)
            ask = {
                reference
                for offer in offers.values()
                for reference in offer.narinfo.references
                if reference not in self._asked and not self._is_valid(reference)
            }
        self._close()

    def _close(self) -> None:
        """Find out which of the offers have all that they refer to."""
        offers, depths = self.available.offers, self.available.depths
        waiting: dict[StorePath, list[StorePath]] = {}
        pending: dict[StorePath, int] = {}
        ready: list[StorePath] = []
        for path, offer in self._open.items():
            needs = [
                reference
                for reference in offer.narinfo.references
                if reference != path and reference not in offers and not self._is_valid(reference)
            ]
            pending[path] = len(needs)
            for need in needs:
                waiting.setdefault(need, []).append(path)
            if not needs:
                ready.append(path)
        for path in ready:  # which grows meanwhile
            offers[path] = offer = self._open.pop(path)
            below = (depths.get(r, -1) for r in offer.narinfo.references - {path})
            depths[path] = 1 + max(below, default=-1)
            for other in waiting.get(path, ()):
                pending[other] -= 1
                if not pending[other]:
                    ready.append(other)


def _may_substitute(drv: Derivation) -> bool:
    return drv.environment.get("allowSubstitutes", "1") == "1"
