"""guixd as a subprocess, with everything below one directory."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from machine import BUILD_USERS, free_ids
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready
from twisted.internet.interfaces import IReactorProcess, IReactorUNIXDatagram
from twisted.internet.protocol import DatagramProtocol, ProcessProtocol
from twisted.python.failure import Failure

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Place:
    """Where the daemon keeps its files."""

    directory: Path

    @property
    def store(self) -> Path:
        return self.directory / "store"

    @property
    def socket(self) -> Path:
        return self.directory / "socket"

    def make(self) -> None:
        """Create the directory.

        :raises PermissionError: it belongs to another user.
        """
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        if self.directory.stat().st_uid != os.geteuid():
            raise PermissionError(
                f"{self.directory} belongs to another user; choose a place of your own with"
                " DEMO_DIRECTORY=/tmp/demo"
            )
        (self.directory / "tmp").mkdir(exist_ok=True)

    def environment(self) -> dict[str, str]:
        """Return the variables that the daemon needs besides its options."""
        at = str(self.directory)
        return {
            "NIX_STORE_DIR": str(self.store),
            "GUIX_STATE_DIRECTORY": at + "/var",
            "GUIX_DATABASE_DIRECTORY": at + "/var/db",
            "GUIX_LOG_DIRECTORY": at + "/log",
            "GUIX_CONFIGURATION_DIRECTORY": at + "/etc",
            "TMPDIR": at + "/tmp",
        }

    def command(self) -> list[str]:
        """Return the daemon's command line."""
        arguments = [sys.executable, "-m", "guixd", f"--listen={self.socket}", "--max-jobs=2"]
        arguments.append("--no-substitutes")
        if os.geteuid() == 0:
            first, gid = free_ids()
            arguments.append(f"--build-uids={first}-{first + BUILD_USERS - 1}:{gid}")
        return arguments


def demo_place() -> Place:
    """Return `.demo` in the checkout, or a shorter name if a socket's would be too long."""
    chosen = os.environ.get("DEMO_DIRECTORY")
    directory = Path(chosen).absolute() if chosen else CHECKOUT / ".demo"
    if len(str(directory)) > 80:
        directory = Path(f"/tmp/guixd-demo-{os.geteuid()}")
    return Place(directory)


class _Notifications(DatagramProtocol):
    def __init__(self, ready: Deferred[None]) -> None:
        self._ready = ready

    def datagramReceived(self, datagram: bytes, addr: object) -> None:
        if b"READY=1" in datagram.split(b"\n") and not self._ready.called:
            self._ready.callback(None)


class Daemon(ProcessProtocol):
    """A running guixd.

    :ivar ready: fires when it listens; fails if it ends before that.
    :ivar ended: fires with its exit status.
    """

    def __init__(self, reactor: IReactorProcess | IReactorUNIXDatagram, place: Place) -> None:
        self.ready: Deferred[None] = Deferred()
        self.ended: Deferred[int] = Deferred()
        self._log = (place.directory / "daemon.log").open("ab", buffering=0)
        self._private = tempfile.TemporaryDirectory(prefix="guixd-demo-")
        notify = os.path.join(self._private.name, "notify")
        self._port = reactor.listenUNIXDatagram(notify, _Notifications(self.ready))  # type: ignore[union-attr]
        self._process = reactor.spawnProcess(  # type: ignore[union-attr]
            self,
            sys.executable,
            place.command(),
            env={**os.environ, **place.environment(), "NOTIFY_SOCKET": notify},
            path=str(CHECKOUT),
        )

    def outReceived(self, data: bytes) -> None:
        self._log.write(data)

    errReceived = outReceived

    def processEnded(self, reason: Failure) -> None:
        self._log.close()
        status = 0 if reason.check(ProcessDone) else reason.value.status or 1  # type: ignore[union-attr]
        self._port.stopListening()
        self._private.cleanup()
        if not self.ready.called:
            self.ready.errback(RuntimeError(f"guixd ended at once ({reason.getErrorMessage()})"))
        self.ended.callback(status)

    async def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        if not self.ended.called:
            try:
                self._process.signalProcess("TERM")
            except ProcessExitedAlready:
                pass
            await self.ended
