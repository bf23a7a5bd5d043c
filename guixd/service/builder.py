"""What builds for the daemon: the engine and its launcher, made at the first need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from guixd.build.broadcast import Observer
from guixd.build.job import Interest
from guixd.build.request import BuildRequest
from guixd.build.threads import pool_threads
from guixd.service.shared import build_gid

if TYPE_CHECKING:
    from guixd.service.shared import Daemon
    from guixd.store.local import LocalStore

_log = Logger()

BUILD_THREADS = 32
"""So many that builds hardly wait for others' outputs, which can take long; but those of
small files slow the reactor's thread down, the more the more threads are at it."""


def _tell(problems: list[str]) -> None:
    for problem in problems:
        _log.warn("{problem}", problem=problem)


def _failed(failure: Failure) -> None:
    if not failure.check(CancelledError):  # type: ignore[no-untyped-call]
        _log.failure("cannot remove the build trees of a dead daemon", failure)


class SandboxBuilder:
    """Builds in containers on this machine."""

    def __init__(self, daemon: Daemon, store: LocalStore) -> None:
        # Not needed to answer the first greeting.
        from guixd.build.engine import Engine
        from guixd.build.launcher import ZygoteLauncher
        from guixd.build.leftovers import remove_leftovers

        temporary = daemon.settings.directories.temporary
        gid = None if daemon.uid else build_gid(daemon.settings)
        self._interest = Interest()
        removing = daemon.threads(remove_leftovers, temporary, gid, self._interest.check)
        removing.addCallbacks(_tell, _failed)
        reactor: Any = daemon.reactor
        self._launcher = ZygoteLauncher(reactor)
        self._pool = ThreadPool(0, BUILD_THREADS, "guixd-build")
        self._pool.start()
        self._engine = Engine(
            reactor,
            daemon.settings,
            store,
            self._launcher,
            pool_threads(reactor, self._pool),
            fetcher=daemon.fetcher,
            substitutes=daemon.substitutes,
        )

    def build(self, request: BuildRequest, observer: Observer) -> Deferred[None]:
        """Carry out REQUEST for OBSERVER; see `IBuilder.build`."""
        return self._engine.build(request, observer)

    def freed(self) -> None:
        """See whether builds that wait for disk can begin."""
        self._engine.freed()

    def close(self) -> None:
        """Begin no more builds."""
        self._engine.close()

    async def _stop(self) -> None:
        self._interest.lose()
        try:
            await self._engine.stop()
        finally:
            await self._launcher.stop()
            self._pool.stop()

    def stop(self) -> Deferred[None]:
        """End all builds; the Deferred fires when nothing of them is left."""
        return Deferred.fromCoroutine(self._stop())
