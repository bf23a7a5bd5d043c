"""The list of substitute servers in the local network (spec: substitutes §11, options O25)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from guixd.build.threads import Threads
from guixd.service.connection import Reactor
from guixd.settings import Settings

if TYPE_CHECKING:
    from guixd.net.announced import Server
    from guixd.net.discovery import Discovery

_log = Logger()


class Discovering(Service):
    """Keeps `STATE/discover/publish`, with one URL in a line, if the settings want it."""

    def __init__(
        self, reactor: Reactor, settings: Settings, threads: Threads, environ: Mapping[str, str]
    ) -> None:
        self._reactor = reactor
        self._wanted = settings.discover
        self._file = f"{settings.directories.state}/discover/publish"
        self._threads = threads
        self._environ = environ
        self._discovery: Discovery | None = None
        self._next: tuple[Server, ...] | None = None
        self._writing: Deferred[None] | None = None

    @property
    def pid(self) -> int:
        """The id of the process that browses, 0 if there is none."""
        return 0 if self._discovery is None else self._discovery.pid

    def startService(self) -> None:
        """Begin with no servers."""
        super().startService()  # type: ignore[no-untyped-call]
        if self._wanted:
            from guixd.net.discovery import Discovery

            self._delete()
            self._discovery = Discovery(self._reactor, self._environ, self._found)
            self._discovery.start()

    def _delete(self) -> None:
        with suppress(OSError):
            os.unlink(self._file)

    def _found(self, servers: tuple[Server, ...]) -> None:
        self._next = servers
        if self._writing is None:
            self._writing = Deferred.fromCoroutine(self._write())

    async def _write(self) -> None:
        try:
            while self._next is not None:
                servers, self._next = self._next, None
                text = "".join(f"{server.url}\n" for server in servers)
                try:
                    await self._threads(_put, self._file, text.encode())
                except OSError as error:
                    _log.error("cannot write {file}: {error}", file=self._file, error=error)
        finally:
            self._writing = None

    async def _stop(self) -> None:
        discovery, self._discovery = self._discovery, None
        if discovery is not None:
            await discovery.stop()
            self._next = None
            if self._writing is not None:
                await self._writing
            self._delete()

    def stopService(self) -> Deferred[None]:
        """Find no more, and forget what was found."""
        super().stopService()  # type: ignore[no-untyped-call]
        return Deferred.fromCoroutine(self._stop())


def _put(file: str, data: bytes) -> None:
    """Make DATA the contents of FILE, in one step."""
    from guixd.net.cachefiles import replace_file

    os.makedirs(os.path.dirname(file), exist_ok=True)
    replace_file(file, data)
