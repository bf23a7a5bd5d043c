"""The parts of the daemon's service, each a service of its own."""

from __future__ import annotations

from collections.abc import Mapping

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from guixd.build.threads import pool_threads
from guixd.formats.path import StoreDirectory
from guixd.service.admission import Admission
from guixd.service.connection import Reactor, SessionFactory
from guixd.service.listener import Listener
from guixd.service.listening import BoundSocket, open_all
from guixd.service.notify import notify
from guixd.service.shared import Daemon

_log = Logger()

WORKER_THREADS = 4
STOP_MARGIN = 60
"""Seconds in which builds that were ended are cleaned up."""


class Store(Service):
    """The store, which is opened by the first session."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def stopService(self) -> None:
        """Close it."""
        super().stopService()  # type: ignore[no-untyped-call]
        self._daemon.close_store()


class Builds(Service):
    """What builds, which begins with the first build."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def stopService(self) -> Deferred[None]:
        """End all builds; the Deferred fires when nothing of them is left."""
        super().stopService()  # type: ignore[no-untyped-call]
        return Deferred.fromCoroutine(self._daemon.stop_builds())


class Workers(Service):
    """The worker threads.

    :ivar threads: calls functions in them.
    """

    def __init__(self, reactor: Reactor) -> None:
        self._pool = ThreadPool(0, WORKER_THREADS, "guixd-worker")
        self.threads = pool_threads(reactor, self._pool)

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        self._pool.start()

    def stopService(self) -> None:
        if self.running:
            super().stopService()  # type: ignore[no-untyped-call]
            self._pool.stop()


class Listeners(Service):
    """The sockets and the connections that came over them."""

    def __init__(
        self,
        reactor: Reactor,
        daemon: Daemon,
        session: SessionFactory,
        environ: Mapping[str, str],
    ) -> None:
        self._reactor = reactor
        self._daemon = daemon
        self._session = session
        self._environ = environ
        self._sockets: list[BoundSocket] = []
        self._listeners: list[Listener] = []
        self._admission: Admission | None = None

    @property
    def descriptions(self) -> tuple[str, ...]:
        """What is listened on, as the log names it."""
        return tuple(bound.description for bound in self._sockets)

    def startService(self) -> None:
        """Listen.

        :raises GuixdError: an endpoint cannot be listened on.
        """
        settings = self._daemon.settings
        endpoints = settings.listen or (settings.directories.socket,)
        self._sockets = open_all(endpoints, self._environ)
        super().startService()  # type: ignore[no-untyped-call]
        store = StoreDirectory(settings.directories.store)
        self._admission = admission = Admission(self._reactor, settings, self._daemon.uid)
        for bound in self._sockets:
            listener = Listener(
                self._reactor, bound.socket, self._session, store=store, admission=admission
            )
            listener.start()
            self._listeners.append(listener)
            _log.info("listening on {endpoint}", endpoint=bound.description)
        notify(self._environ, "READY=1")

    def close(self) -> None:
        """Stop listening; clients stay connected."""
        if not self._sockets:
            return
        state, seconds = "STOPPING=1", self._daemon.settings.stop_timeout
        if seconds:
            state += f"\nEXTEND_TIMEOUT_USEC={1_000_000 * (seconds + STOP_MARGIN)}"
        notify(self._environ, state)
        for listener in self._listeners:
            listener.close()
        for bound in self._sockets:
            bound.close()
        self._sockets = []

    async def _stop(self) -> None:
        self.close()
        if self._admission is not None:
            self._admission.stop()
        for listener in self._listeners:
            await listener.stop()
        self._listeners = []

    def stopService(self) -> Deferred[None]:
        """Stop listening and disconnect everybody, which cancels their work."""
        super().stopService()  # type: ignore[no-untyped-call]
        return Deferred.fromCoroutine(self._stop())
