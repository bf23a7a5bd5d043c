"""Builders as Twisted processes: what the daemon makes of the zygote's answers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import astuple, replace
from itertools import count
from socket import socket
from typing import Any, cast

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import (
    IAddress,
    IProcessTransport,
    IPushProducer,
    IReactorFDSet,
    IReadDescriptor,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from guixd.build.program import beginning, prepare
from guixd.build.setups import advice
from guixd.build.uplink import UplinkProtocol
from guixd.build.zygote import Zygote
from guixd.errors import SandboxError
from guixd.interfaces import ILauncher
from guixd.net.helpers import Death
from guixd.net.spawning import pair
from guixd.sandbox.spec import Base, SandboxSpec

_log = Logger()

CHUNK = 65536
"""Most bytes that one `childDataReceived` passes on."""
LOST = "the process that runs builders has died"
_SEVERED = "the network of this build has broken down, as slirp4netns has ended"


class BuilderLost(ProcessTerminated):
    """A builder was killed as the process that runs builders has died."""


@implementer(IReadDescriptor)
class _LogPipe:
    """The reading end of a builder's log."""

    def __init__(
        self, reactor: IReactorFDSet, received: Callable[[bytes], None], ended: Callable[[], None]
    ) -> None:
        self._reactor = reactor
        self._received = received
        self._ended = ended
        self._descriptor, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._descriptor, False)

    @property
    def closed(self) -> bool:
        return self._descriptor < 0

    def fileno(self) -> int:
        return self._descriptor

    def logPrefix(self) -> str:
        return "builder"

    def doRead(self) -> None:
        try:
            data = os.read(self._descriptor, CHUNK)
        except BlockingIOError:
            return
        if data:
            self._received(data)
        else:
            self.close()

    def connectionLost(self, reason: Failure) -> None:
        self.close()

    def pause(self) -> None:
        if not self.closed:
            self._reactor.removeReader(self)

    def resume(self) -> None:
        if not self.closed:
            self._reactor.addReader(self)

    def close(self) -> None:
        if not self.closed:
            self._reactor.removeReader(self)
            os.close(self._descriptor)
            self._descriptor = -1
            self._ended()


@implementer(IAddress)
class ProcessAddress:
    """The address of either end of a builder: it has none."""


@implementer(IProcessTransport, IPushProducer)
class BuilderProcess:
    """A builder that runs: the transport of its protocol, and a producer of its log.

    Methods that concern standard input do nothing: that is the null device.

    :ivar pid: the process id in the daemon's pid namespace.
    :ivar usage: when it has exited, its seconds of user and of system time and
        the most KiB of memory it had resident.
    :ivar alone: whether it has exited and certainly left no process of a build user.
    """

    def __init__(
        self, reactor: IReactorFDSet, protocol: object, kill: Callable[[int], None]
    ) -> None:
        self.pid: int = 0
        self.usage: tuple[float, float, int] | None = None
        self.alone = False
        self.set_up: Deferred[BuilderProcess] = Deferred(self._cancel)
        self.pipe = _LogPipe(reactor, self._data, self._log_ended)
        self._protocol: Any = protocol
        self._kill = kill
        self._running = False
        self._cancelled = False
        self._failure: SandboxError | None = None
        self._end: Failure | None = None
        self._uplink: UplinkProtocol | None = None
        self._severed = False
        self._pidfd = -1
        self._reactor = reactor

    # IProcessTransport and IPushProducer.

    def signalProcess(self, signalID: str | int) -> None:
        """Send a signal to the builder and its process group.

        :param signalID: a number, or a name such as `KILL`.
        :raises ProcessExitedAlready: it is known to have ended.
        """
        if self._end is not None:
            raise ProcessExitedAlready()
        number = signal.Signals["SIG" + signalID] if isinstance(signalID, str) else signalID
        self._kill(int(number))

    def loseConnection(self) -> None:
        """Give up reading the log, so that `processEnded` no longer waits for its end."""
        self.pipe.close()

    def pauseProducing(self) -> None:
        """Stop reading the log; the builder waits when the pipe is full."""
        self.pipe.pause()

    def resumeProducing(self) -> None:
        """Read the log again."""
        self.pipe.resume()

    def stopProducing(self) -> None:
        """Like `loseConnection`."""
        self.loseConnection()

    def closeStdin(self) -> None:
        pass

    def closeStdout(self) -> None:
        self.loseConnection()

    def closeStderr(self) -> None:
        pass

    def closeChildFD(self, descriptor: int) -> None:
        pass

    def writeToChild(self, childFD: int, data: bytes) -> None:
        pass

    def write(self, data: bytes) -> None:
        pass

    def writeSequence(self, data: Iterable[bytes]) -> None:
        pass

    def getPeer(self) -> IAddress:
        return ProcessAddress()

    def getHost(self) -> IAddress:
        return ProcessAddress()

    def use(self, uplink: UplinkProtocol) -> None:
        """End with UPLINK, and let that end with this."""
        self._uplink = uplink
        uplink.ended.addCallback(lambda _: self._check_uplink())

    # What the zygote tells.

    def started(self, pid: int) -> None:
        self.pid = pid
        with suppress(OSError):  # It has ended, or there are too many descriptors.
            self._pidfd = os.pidfd_open(pid)
        if not self._cancelled:
            self._running = True
            self._call("makeConnection", self)
            self.pipe.resume()
            self.set_up.callback(self)
            self._check_uplink()

    def failed(self, phase: str, number: int, text: str) -> None:
        words = f"while setting up the container of the build: in phase '{phase}': {text}"
        help_text = advice(phase, number, text)
        self._failure = SandboxError(phase, f"{words}; {help_text}" if help_text else words)

    def exited(self, status: int, usage: tuple[float, float, int], alone: bool) -> None:
        self.usage = usage
        self.alone = alone
        self._forget()
        if self._uplink is None:
            self._over(status)
        else:
            self._uplink.end().addCallback(lambda _: self._over(status))

    def lost(self) -> None:
        """The zygote died, and with it, by the kernel's hand, the builder.

        A builder may have asked the kernel not to do that.
        """
        if self._pidfd < 0:
            self._lost()
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, 0)  # so that the group is still its own
            os.killpg(self.pid, signal.SIGKILL)
        # Nothing may be done with what a builder has made until it is dead.
        Death(self._reactor, self._pidfd, self._lost)

    def _forget(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _lost(self) -> None:
        if self._running:
            self._call("childDataReceived", 1, f"guixd: {LOST}\n".encode())
        else:
            self._failure = SandboxError("zygote", LOST)
        self._over(signal.SIGKILL, BuilderLost(None, signal.SIGKILL))  # type: ignore[no-untyped-call]

    def _check_uplink(self) -> None:
        """Kill a builder that waits in vain for packets."""
        uplink = self._uplink
        if uplink is not None and uplink.wanted and uplink.ended.called and self._running:
            self._severed = True
            self._kill(signal.SIGKILL)

    def _over(self, status: int, reason: Exception | None = None) -> None:
        if self._severed and status == signal.SIGKILL:
            self._call("childDataReceived", 1, f"guixd: {_SEVERED}\n".encode())
        self._end = Failure(reason or _reason(status))  # type: ignore[no-untyped-call]
        if self._running:
            self._call("processExited", self._end)
            self._check_end()
            return
        self.pipe.close()
        if self._cancelled:
            self.set_up.unpause()
        else:
            text = f"the new process ended with wait status {status}"
            self.set_up.errback(self._failure or SandboxError("new process", text))

    def _cancel(self, deferred: Deferred[BuilderProcess]) -> None:
        """Kill; the cancelled Deferred fires when nothing is left."""
        self._cancelled = True
        deferred.pause()
        self._kill(signal.SIGKILL)

    def _data(self, data: bytes) -> None:
        self._call("childDataReceived", 1, data)

    def _log_ended(self) -> None:
        if self._running:
            self._call("childConnectionLost", 1)
            self._check_end()

    def _check_end(self) -> None:
        if self._end is not None and self.pipe.closed:
            self._running = False
            self._call("processEnded", self._end)

    def _call(self, method: str, *arguments: object) -> None:
        try:
            getattr(self._protocol, method)(*arguments)
        except Exception:  # noqa: BLE001
            _log.failure("in {method} of a builder's protocol", method=method)
            if self._end is None:
                self._kill(signal.SIGKILL)


def _reason(status: int) -> ProcessDone | ProcessTerminated:
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return ProcessDone(status)  # type: ignore[no-untyped-call]
    if code > 0:
        return ProcessTerminated(code, None, status)  # type: ignore[no-untyped-call]
    return ProcessTerminated(None, -code, status)  # type: ignore[no-untyped-call]


@implementer(ILauncher)
class ZygoteLauncher:
    """Runs builders by way of a zygote, which is started at the first need."""

    def __init__(self, reactor: IReactorFDSet) -> None:
        self._reactor = reactor
        self._zygote: Zygote | None = None
        self._base: Base | None = None
        """What the zygote begins containers with."""
        self._numbers = count(1)
        self._builders: dict[int, BuilderProcess] = {}
        self._users: dict[int, Deferred[None]] = {}
        self._stopping: Deferred[None] | None = None

    @property
    def zygote_pid(self) -> int:
        """The process id of the zygote, 0 if there is none."""
        return 0 if self._zygote is None else self._zygote.pid

    def spawn(self, protocol: object, spec: object) -> Deferred[BuilderProcess]:
        """Run the builder of SPEC under PROTOCOL, see `ILauncher.spawn`.

        Cancelling the Deferred kills the process; it then fires when that is dead.
        """
        assert isinstance(spec, SandboxSpec)
        try:
            if spec.uplink is None:
                return self._start(protocol, spec).set_up
            return self._start_connected(protocol, spec, spec.uplink.process).set_up
        except OSError as error:
            return fail(_unusable("cannot run a builder", error))
        except SandboxError as error:
            return fail(error)

    def _start(self, protocol: object, spec: SandboxSpec, *link: socket) -> BuilderProcess:
        """Run the builder of SPEC, which gets LINK, a socket to another one, if it is given.

        :raises OSError: or `SandboxError`: it cannot be run.
        """
        zygote = self._get_zygote()
        number = next(self._numbers)
        builder = BuilderProcess(
            self._reactor, protocol, lambda which: zygote.send(["signal", number, which])
        )
        try:
            base = spec.base
            if base is not None and base != self._base and not spec.filter:
                zygote.send(["begin", 0], _memory_file(beginning(base)))
                self._base = base
            program = _memory_file(prepare(number, spec))
        except OSError:
            os.close(builder.pipe.write_end)
            builder.pipe.close()
            raise
        self._builders[number] = builder
        uid = spec.ids.uid if spec.ids is not None and spec.base is None else 0
        request = ["spawn", number, _kind(spec), uid, not spec.filter]
        descriptors = builder.pipe.write_end, program, *(end.detach() for end in link)
        zygote.send(request, *descriptors)
        return builder

    def _start_connected(
        self, protocol: object, spec: SandboxSpec, moving: SandboxSpec
    ) -> BuilderProcess:
        """Run the builder of SPEC, and MOVING, which moves its packets; both end together."""
        uplink = UplinkProtocol()
        ours, theirs = pair()
        with ours, theirs:
            process = self._start(uplink, replace(moving, cgroup=spec.cgroup), theirs)
            uplink.watch(process)
            try:
                builder = self._start(protocol, spec, ours)
            except BaseException:
                uplink.end()
                raise
        builder.use(uplink)
        return builder

    def kill_user(self, uid: int) -> Deferred[None]:
        """Kill every process of UID; the Deferred fires when none is left.

        It fails with `SandboxError` if that may not be, such as for uid 0.
        """
        try:
            zygote = self._get_zygote()
        except OSError as error:
            return fail(_unusable("cannot kill processes", error))
        except SandboxError as error:
            return fail(error)
        number = next(self._numbers)
        done: Deferred[None] = Deferred(lambda deferred: None)
        self._users[number] = done
        zygote.send(["kill-user", number, uid])
        return done

    def start(self) -> None:
        """Start the zygote now, so that the first build need not wait for it.

        :raises OSError: it cannot be started.
        """
        self._get_zygote()

    def stop(self) -> Deferred[None]:
        """Kill all builders and end; nothing can be started afterwards."""
        if self._stopping is None:
            self._stopping = Deferred()
            for builder in list(self._builders.values()):
                try:
                    builder.signalProcess(signal.SIGKILL)
                except ProcessExitedAlready:
                    pass
            self._check_idle()
        stopped: Deferred[None] = Deferred()
        self._stopping.chainDeferred(stopped) if self._zygote else stopped.callback(None)
        return stopped

    def _get_zygote(self) -> Zygote:
        if self._stopping is not None:
            raise SandboxError("zygote", "the daemon is stopping")
        if self._zygote is None:
            self._zygote = Zygote(self._reactor, self._answered)
            self._zygote.ended.addCallback(self._lost)
        return self._zygote

    def _answered(self, answer: list[Any]) -> None:
        what, number, *more = answer
        if what == "done":
            done = self._users.pop(number)
            text = more[0]
            if not done.called:
                done.errback(SandboxError("kill user", text)) if text else done.callback(None)
        elif what == "exited":
            status, usage, alone = more
            self._builders.pop(number).exited(status, cast(Any, tuple(usage)), alone)
        else:
            getattr(self._builders[number], what)(*more)
        self._check_idle()

    def _check_idle(self) -> None:
        idle = not self._builders and not self._users
        if self._stopping is not None and self._zygote is not None and idle:
            self._zygote.close()

    def _lost(self, _: None) -> None:
        self._zygote = self._base = None
        builders, self._builders = self._builders, {}
        users, self._users = self._users, {}
        if self._stopping is None:
            _log.error(LOST + "; {count} builds are lost", count=len(builders))
        for builder in builders.values():
            builder.lost()
        for done in users.values():
            if not done.called:
                done.errback(SandboxError("zygote", LOST))
        if self._stopping is not None:
            self._stopping.callback(None)


def _unusable(problem: str, error: OSError) -> SandboxError:
    """Return what to say of a PROBLEM with the zygote, and what helps."""
    help_text = advice("", error.errno or 0, "")
    return SandboxError(
        "zygote", f"{problem}: {error.strerror}" + f"; {help_text}" * bool(help_text)
    )


def _kind(spec: SandboxSpec) -> object:
    """Return which kind of process SPEC needs, see `guixd.sandbox.zygote`."""
    if spec.user_namespace is not None:
        return astuple(spec.user_namespace)
    return "plain" if spec.base is None else "container"


def _memory_file(content: bytes) -> int:
    """Return the descriptor of a new file without a name."""
    descriptor = os.memfd_create("program", os.MFD_CLOEXEC)
    with open(descriptor, "wb", buffering=0, closefd=False) as file:
        file.write(content)
    return descriptor
