"""The daemon as a Twisted service (spec: options §2, §5)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from twisted.application.service import MultiService, Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger

from guixd.service.builder import SandboxBuilder
from guixd.service.connection import Reactor
from guixd.service.discovering import Discovering
from guixd.service.options import not_effective
from guixd.service.parts import Builds, Listeners, Store, Workers
from guixd.service.reception import Reception
from guixd.service.shared import BuilderFactory, Daemon
from guixd.settings import Settings

if TYPE_CHECKING:
    from guixd.net.spawning import StartedFetcher

_log = Logger()


class GuixdService(MultiService):
    """The daemon, for embedding: `store`, `workers`, `builds`, `listeners` and
    `discovering` by name.

    Parts start in this order and stop in the opposite one, each after the other.
    """

    def __init__(
        self,
        reactor: Reactor,
        settings: Settings,
        *,
        builder: BuilderFactory = SandboxBuilder,
        environ: Mapping[str, str] = os.environ,
        ahead: StartedFetcher | None = None,
    ) -> None:
        """Serve the store of SETTINGS.

        :param builder: makes what builds.
        :param environ: where the service manager's variables are.
        :param ahead: a process for its downloads that was started before.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.settings = settings
        self.workers = Workers(reactor)
        self.daemon = Daemon(reactor, settings, self.workers.threads, builder, environ, ahead)
        session = Reception(self.daemon).session
        self.listeners = Listeners(reactor, self.daemon, session, environ)
        parts: dict[str, Service] = {
            "store": Store(self.daemon),
            "workers": self.workers,
            "builds": Builds(self.daemon),
            "listeners": self.listeners,
            "discovering": Discovering(reactor, settings, self.workers.threads, environ),
        }
        for name, part in parts.items():
            part.setName(name)  # type: ignore[no-untyped-call]
            part.setServiceParent(self)  # type: ignore[no-untyped-call]

    def startService(self) -> None:
        """Start.

        :raises GuixdError: an endpoint cannot be listened on.
        """
        try:
            super().startService()  # type: ignore[no-untyped-call]
        except BaseException:
            self.workers.stopService()
            raise
        settings = self.settings
        absent = not_effective(settings)
        if absent:
            _log.info("not effective in this version: {absent}", absent=", ".join(absent))
        nobody = settings.build_users_group is None and settings.build_uids is None
        if nobody and os.geteuid() == 0:
            _log.warn(
                "running as root without build users, so that nothing can be built:"
                " use --build-users-group or --build-uids"
            )

    async def _stop(self) -> None:
        self.listeners.close()
        await self.daemon.drain()
        for part in reversed(list(self)):
            await maybeDeferred(part.stopService)

    def stopService(self) -> Deferred[None]:
        """Stop; the Deferred fires when no build, socket or thread is left.

        What is at work may go on before, for the time that the settings give; see `hurry`.
        """
        Service.stopService(self)  # type: ignore[no-untyped-call]
        return Deferred.fromCoroutine(self._stop())

    def hurry(self) -> None:
        """End at once what `stopService` lets go on."""
        self.daemon.hurry()
