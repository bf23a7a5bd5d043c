"""What every build uses."""

from __future__ import annotations

from dataclasses import dataclass

from twisted.internet.interfaces import IReactorTime

from guixd.build import container
from guixd.build.builder import Launcher
from guixd.build.threads import Threads
from guixd.build.users import BuildUserPool
from guixd.formats.derivation import Derivation
from guixd.settings import Settings
from guixd.store.local import LocalStore


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

    def all_valid(self, drv: Derivation) -> bool:
        """Whether DRV has nothing left to build."""
        return all(self.store.database.is_valid(path) for path in drv.output_paths)
