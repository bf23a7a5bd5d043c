"""The daemon's side of the process that finds substitute servers (spec: substitutes §11)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from guixd.net.announced import Server, read_servers
from guixd.net.channel import Channel
from guixd.net.helpers import Death
from guixd.net.spawning import pair, start_helper

_log = Logger()

RETRY = 60.0
"""Seconds until the process is started again that has died; longer each time, up to `LONGEST`."""
LONGEST = 3600.0
_BOOT = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from guixd.net.browser import main; main(int(sys.argv[1]))"
)
_KEPT_VARIABLES = ("PATH", "LANG")


class Discovery:
    """Runs that process.

    :param found: called with the servers that there are, at the start and when they change.
    """

    def __init__(
        self,
        reactor: Any,
        environ: Mapping[str, str],
        found: Callable[[tuple[Server, ...]], None],
    ) -> None:
        self._reactor = reactor
        self._environ = environ
        self._found = found
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: Deferred[None] = succeed(None)
        self._timer: IDelayedCall | None = None
        self._started = 0.0
        self._wait = 0.0
        self._useless = False

    @property
    def pid(self) -> int:
        """The id of the process, 0 if there is none."""
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it."""
        self._timer = None
        self._started = self._reactor.seconds()
        ours, theirs = pair()
        environ = {name: self._environ[name] for name in _KEPT_VARIABLES if name in self._environ}
        with theirs:
            try:
                process = start_helper(_BOOT, theirs, environ)
            except OSError as error:
                ours.close()
                self._fail(str(error))
                return
        channel = Channel(self._reactor, ours, self._received, process.kill)
        self._process, self._ended = process, Deferred()

        def reap() -> None:
            process.wait()
            channel.drain()
            channel.close()
            self._process = None
            if not self._useless:
                self._fail("it has died")
            self._ended.callback(None)

        Death(self._reactor, os.pidfd_open(process.pid), reap)

    def stop(self) -> Deferred[None]:
        """End it; the Deferred fires when it is gone."""
        self._useless = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._process is not None:
            self._process.kill()
        return self._ended

    def _fail(self, why: str) -> None:
        lived = self._reactor.seconds() - self._started
        wait = RETRY if lived > LONGEST else max(self._wait, RETRY)
        self._wait = min(2 * wait, LONGEST)
        _log.error(
            "no servers are found in the local network for {seconds} seconds, as the process"
            " that does it cannot: {why}",
            seconds=int(wait),
            why=why,
        )
        self._timer = self._reactor.callLater(wait, self.start)

    def _received(self, message: list[Any], data: bytes, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)
        try:
            what, told = message
            if what == "broken":
                self._useless = True
                _log.warn("no servers are found in the local network: {why}", why=str(told))
            else:
                self._found(read_servers(told))
        except (TypeError, ValueError):
            # It deals with hostile bytes, so that nothing it says is beyond doubt.
            _log.failure("the process that finds servers does not make sense")
            if self._process is not None:
                self._process.kill()
