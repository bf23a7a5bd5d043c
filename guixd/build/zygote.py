"""The zygote process as the reactor sees it: packets out, packets in, and its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFDSet
from twisted.logger import Logger

from guixd.net.channel import Channel
from guixd.net.helpers import Death
from guixd.net.spawning import pair, start_helper

_log = Logger()

_BOOT = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from guixd.sandbox.zygote import main; main(int(sys.argv[1]))"
)


class Zygote:
    """A zygote that runs.

    :ivar ended: fires with None when the process is dead and all its packets are handled.
    """

    def __init__(self, reactor: IReactorFDSet, answered: Callable[[list[Any]], None]) -> None:
        """Start the process.

        :param answered: called with each packet, see `guixd.sandbox.zygote`.
        :raises OSError: it cannot be started.
        """
        self.ended: Deferred[None] = Deferred()
        self._answered = answered
        ours, theirs = pair()
        with theirs:
            environ = {"PATH": os.environ.get("PATH", os.defpath)}
            self._process = start_helper(_BOOT, theirs, environ)
        self._death = Death(reactor, os.pidfd_open(self._process.pid), self._ended)
        # That it hangs up is no news: `Death` tells when it is dead.
        self._channel = Channel(reactor, ours, self._received, lambda: None)

    @property
    def pid(self) -> int:
        """The process id of the zygote."""
        return self._process.pid

    def send(self, request: Sequence[object], *descriptors: int) -> None:
        """Send REQUEST; the DESCRIPTORS are closed when they are sent."""
        self._channel.send(request, descriptors=descriptors)

    def close(self) -> None:
        """Hang up, so that the zygote ends; no more answers are wanted."""
        self._channel.close()

    def _received(self, answer: list[Any], _data: bytes, descriptors: list[int]) -> None:
        for descriptor in descriptors:  # of which it has none to give
            os.close(descriptor)
        self._answered(answer)

    def _ended(self) -> None:
        self._channel.drain()
        self._channel.close()
        status = self._process.wait()
        _log.debug("zygote {pid} ended: {status}", pid=self._process.pid, status=status)
        self.ended.callback(None)
