"""What every build uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from guixd.build import container
from guixd.build.builder import Launcher
from guixd.build.builtins import Builtins
from guixd.build.cgroups import Cgroups
from guixd.build.job import Interest
from guixd.build.threads import Threads
from guixd.build.turns import BUSY_RETRY
from guixd.build.users import BuildUserPool
from guixd.errors import Busy
from guixd.formats.derivation import Derivation
from guixd.settings import Settings
from guixd.store.local import LocalStore
from guixd.store.queries import Queries

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Workshop:
    """The machine, the store and the settings as builds find them."""

    reactor: IReactorTime
    threads: Threads
    settings: Settings
    store: LocalStore
    launcher: Launcher
    users: BuildUserPool | None
    """`None` if builders run as the daemon's own user."""
    host: container.Host
    builtins: Builtins | None = None
    cgroups: Cgroups | None = None
    """`None` if builds have no limits."""

    def all_valid(self, drv: Derivation) -> bool:
        """Whether DRV has nothing left to build."""
        return all(self.store.database.is_valid(path) for path in drv.output_paths)

    def under(self, settings: Settings | None) -> Workshop:
        """Return the same with other SETTINGS, if there are some."""
        return self if settings is None else replace(self, settings=settings)

    async def when_free(self, interest: Interest, step: Callable[[], _T]) -> _T:
        """Return what STEP returns; try again while another process writes to the store.

        :raises CancelledError: there is no INTEREST any more.
        """
        while True:
            try:
                return step()
            except Busy:
                await interest.wait(lambda: deferLater(self.reactor, BUSY_RETRY))

    def with_queries(self, function: Callable[[Queries], _T]) -> Callable[[], _T]:
        """Return what calls FUNCTION with a connection to the database of its own, in a thread."""

        def call() -> _T:
            queries = self.store.database.read_only_copy()
            try:
                return function(queries)
            finally:
                queries.close()

        return call
