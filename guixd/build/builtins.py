"""Builders that the daemon provides itself (spec: derivations §9, downloads §1).

To the rest they are processes: they have a number, write a log, can be killed, and end
with a status.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from guixd.build.download import Download
from guixd.build.downloadtools import DownloadTools
from guixd.build.job import Job
from guixd.build.outputs import Known
from guixd.build.results import BuildFailure, Status
from guixd.formats.derivation import Derivation
from guixd.formats.path import StorePath

_log = Logger()

PREFIX = "builtin:"
NAMES = ("download", "git-download")
FIRST_NUMBER = 1 << 23
"""Above all process ids."""
_SIGKILL = 9


def is_builtin(drv: Derivation) -> bool:
    """Whether the builder of DRV is one of the daemon's."""
    return drv.builder.startswith(PREFIX)


def runs_here(drv: Derivation) -> bool:
    """Whether the builder of DRV is a part of the daemon itself, without a process."""
    return drv.builder == PREFIX + "download"


def is_git_download(drv: Derivation) -> bool:
    """Whether the builder of DRV checks a Git commit out."""
    return drv.builder == PREFIX + "git-download"


def refuse_builtin(drv: Derivation) -> None:
    """End a build whose builder is not there.

    :raises BuildFailure: always: unknown ones fail for good, known ones and those with a
        fixed output for now.
    """
    name = drv.builder.removeprefix(PREFIX)
    if name in NAMES:
        raise BuildFailure(
            Status.MISC_FAILURE, f"builder `{drv.builder}' is not supported yet", general=True
        )
    fixed = drv.has_fixed_outputs
    status = Status.TRANSIENT_FAILURE if fixed else Status.PERMANENT_FAILURE
    raise BuildFailure(status, f"there is no builtin builder `{name}'")


@implementer(IPushProducer)
class BuiltinProcess:
    """The transport of a builder that is a coroutine.

    :param reactor: calls what must not happen in the midst of a step of it.
    :ivar pid: a number that no process has.
    :ivar known: at its end, what need not be found out about its outputs again.
    """

    def __init__(self, reactor: Any, pid: int, protocol: Any) -> None:
        self.pid = pid
        self.known: Mapping[StorePath, Known] = {}
        self._reactor = reactor
        self._protocol = protocol
        self._running: Deferred[bool] | None = None
        self._begun = self._ended = False
        self._held = False

    def run(self, work: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        """Do WORK, which returns whether it succeeded."""
        if self._ended:
            return
        self._begun = True
        self._running = Deferred.fromCoroutine(work())
        self._running.addBoth(self._finish)

    def write(self, text: str) -> None:
        """Add TEXT to the log."""
        self._protocol.childDataReceived(1, text.encode("utf-8", "surrogateescape"))

    def write_if_read(self, text: str) -> None:
        """Add TEXT to the log, unless its readers are slow."""
        if not self._held:
            self.write(text)

    def _finish(self, outcome: bool | Failure) -> None:
        if isinstance(outcome, Failure) and not isinstance(outcome.value, CancelledError):
            _log.failure("in a builtin builder", outcome)
            self.write(f"error: {outcome.getErrorMessage()}\n")
            outcome = False
        if isinstance(outcome, Failure):
            self._end(ProcessTerminated(None, _SIGKILL))  # type: ignore[no-untyped-call]
        elif outcome:
            self._end(ProcessDone(0))  # type: ignore[no-untyped-call]
        else:
            self._end(ProcessTerminated(1))  # type: ignore[no-untyped-call]

    def _end(self, reason: Exception) -> None:
        self._ended = True
        failure = Failure(reason)  # type: ignore[no-untyped-call]
        self._protocol.processExited(failure)
        self._protocol.processEnded(failure)

    # What builders' transports have.

    def signalProcess(self, signalID: str | int) -> None:
        """Give the work up, whatever the signal is.

        :raises ProcessExitedAlready: it has ended.
        """
        if self._ended:
            raise ProcessExitedAlready()
        if self._begun:
            # What it writes may be why it is killed, and only what waits can be cancelled.
            self._reactor.callLater(0, self._give_up)
        else:
            self._end(ProcessTerminated(None, _SIGKILL))  # type: ignore[no-untyped-call]

    def _give_up(self) -> None:
        if self._running is not None:
            self._running.cancel()

    def loseConnection(self) -> None:
        """Do nothing: there is no pipe."""

    def pauseProducing(self) -> None:
        """Write only what matters."""
        self._held = True

    def resumeProducing(self) -> None:
        """Write everything again."""
        self._held = False

    def stopProducing(self) -> None:
        """Do nothing."""


class Builtins:
    """Runs the builders that are parts of the daemon.

    :param reactor: calls them in its next turn, when who asked for it is ready.
    :ivar tools: what they use.
    """

    def __init__(self, reactor: Any, tools: DownloadTools) -> None:
        self._reactor = reactor
        self.tools = tools
        self._number = FIRST_NUMBER

    def spawn(
        self, protocol: Any, job: Job, directory: str, hash_parts: Iterable[str]
    ) -> BuiltinProcess:
        """Run the builder of JOB under an `IProcessProtocol`.

        :param directory: where its outputs are to be made, under their base names; nobody
            else can enter it.
        :param hash_parts: what to look for in them.
        """
        self._number += 1
        process = BuiltinProcess(self._reactor, self._number, protocol)
        say, report = process.write, process.write_if_read
        download = Download(self.tools, job, directory, hash_parts, say, report)
        protocol.makeConnection(process)

        async def work() -> bool:
            try:
                return await download.run()
            finally:
                process.known = download.known

        self._reactor.callLater(0, process.run, work)
        return process
