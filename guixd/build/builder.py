"""A builder while it runs: what it writes, what limits it, and who holds or kills it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from guixd.build.patience import Patience
from guixd.build.users import BuildUser

_log = Logger()


class Launcher(Protocol):
    """`interfaces.ILauncher` for the type checker."""

    def spawn(self, protocol: ProcessProtocol, spec: object, /) -> Deferred[Any]: ...
    def kill_user(self, uid: int, /) -> Deferred[None]: ...
    def stop(self) -> Deferred[None]: ...


class Builder(ProcessProtocol):
    """The protocol of one builder.

    :param output: called with what the builder writes.
    :param patience: told what the builder does; kills it when nobody waits any longer.
    :param contained: whether all of its processes end with it.
    :ivar expired: which limit the builder broke; empty if none.
    """

    def __init__(
        self,
        launcher: Launcher,
        output: Callable[[bytes], None],
        patience: Patience[Any],
        *,
        contained: bool,
    ) -> None:
        self.expired = ""
        self._launcher = launcher
        self._output = output
        self._patience = patience
        self._contained = contained
        self._user: BuildUser | None = None
        self._process: Any = None
        self._holders: set[str] = set()
        self._killed = False
        self._killing: Deferred[None] | None = None
        self._ended: Deferred[tuple[Failure]] = Deferred()

    def begin(self, process: Any, user: BuildUser | None) -> None:
        """Watch over the transport PROCESS, whose set-up is done.

        :param user: who it runs as; `None` for the daemon's own user.
        """
        self._process = process
        self._user = user
        self._patience.begin(self._expire)
        if self._holders:
            self._hold(True)

    async def end(self) -> Failure:
        """Wait until it has ended and nobody can write to its log any more.

        :return: how it ended: `ProcessDone` or `ProcessTerminated`.
        """
        try:
            (reason,) = await self._ended
            return reason
        finally:
            self._patience.end()
            process, self._process = self._process, None
            if self._killing is not None:
                # Else it could go on when the next build has this user.
                await self._killing
            if self._user is not None and not self._contained and not process.alone:
                await self._launcher.kill_user(self._user.uid)

    def hold(self, holder: str, on: bool) -> None:
        """Stop or resume reading what it writes; each HOLDER counts once."""
        if self._killed:
            return
        before = bool(self._holders)
        (self._holders.add if on else self._holders.discard)(holder)
        if before != bool(self._holders):
            self._hold(not before)

    def _hold(self, on: bool) -> None:
        if self._process is not None:
            (self._process.pauseProducing if on else self._process.resumeProducing)()
        self._patience.hold(on)

    def kill(self) -> None:
        """Kill it if it runs; what it wrote before is still read."""
        process = self._process
        if process is None or self._killed:
            return
        self._killed = True
        if self._holders:
            process.resumeProducing()
        try:
            process.signalProcess("KILL")
        except ProcessExitedAlready:
            pass
        if self._contained:
            return
        # Processes that left the builder's group may keep the log open.
        if self._user is not None:
            self._killing = self._launcher.kill_user(self._user.uid).addErrback(
                lambda failure: _log.failure("cannot kill a build user's processes", failure)
            )
        else:
            process.loseConnection()

    def _expire(self, reason: str) -> None:
        self.expired = reason
        self.kill()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._patience.heard(len(data))
        self._output(data)

    def processEnded(self, reason: Failure) -> None:
        # In a tuple: a failure as the result would be raised where it is awaited.
        self._ended.callback((reason,))
