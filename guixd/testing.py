"""For tests of programs that embed guixd: a daemon in a directory, and fakes of its parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredQueue, fail, succeed
from twisted.internet.error import ProcessDone, ProcessTerminated
from twisted.internet.interfaces import IProcessProtocol, IReactorTime, IReactorUNIX
from twisted.python.failure import Failure
from zope.interface import implementer

from guixd.build.broadcast import Observer
from guixd.build.request import BuildRequest
from guixd.client import Client, connect
from guixd.errors import FetchError
from guixd.formats.path import StoreDirectory
from guixd.interfaces import IBuilder, IFetcher, ILauncher
from guixd.net.reach import Reach
from guixd.net.requests import Answer, Fetched, Head, Request
from guixd.sandbox.spec import SandboxSpec
from guixd.service.builder import SandboxBuilder
from guixd.service.contract import Builder
from guixd.service.daemon import GuixdService
from guixd.service.shared import BuilderFactory
from guixd.settings import Directories, Settings


def directories_below(directory: str) -> Directories:
    """Return directories of a daemon that all lie in DIRECTORY, its socket included."""
    temporary = directory + "/tmp"
    os.makedirs(temporary, exist_ok=True)
    return Directories(
        store=directory + "/store",
        state=directory + "/var",
        log=directory + "/log",
        database=directory + "/var/db",
        configuration=directory + "/etc",
        temporary=temporary,
    )


class TemporaryDaemon:
    """A whole daemon whose files lie in one directory.

    :ivar service: the daemon itself.
    :ivar socket: the file name of its socket.
    """

    def __init__(
        self,
        reactor: Any,
        directory: str,
        *,
        builder: BuilderFactory | Builder = SandboxBuilder,
        environ: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Prepare a daemon; `start` starts it.

        :param directory: absolute, without symbolic links; made by the caller.
        :param builder: what builds, or what makes it.
        :param environ: the daemon's environment, where proxies are; by default an empty one.
        :param options: fields of `Settings`; other than there, no server is asked for
            substitutes by default, and work ends at once with the daemon.
        """
        self._reactor = reactor
        options.setdefault("durable", False)  # it costs time on a busy disk
        options.setdefault("substitute_urls", ())
        options.setdefault("stop_timeout", 0)
        settings = Settings(directories=directories_below(directory), **options)
        factory: Any = builder if callable(builder) else lambda _daemon, _store: builder
        self.service = GuixdService(reactor, settings, builder=factory, environ=environ or {})
        self.socket = settings.directories.socket

    def start(self) -> TemporaryDaemon:
        """Listen on the socket."""
        self.service.startService()
        return self

    def stop(self) -> Deferred[None]:
        """End everything; the directory stays."""
        return self.service.stopService()

    async def connect(self) -> Client:
        """Return a new client; the caller closes it."""
        from twisted.internet.endpoints import UNIXClientEndpoint

        reactor: IReactorUNIX = self._reactor
        store = StoreDirectory(self.service.settings.directories.store)
        endpoint = UNIXClientEndpoint(reactor, self.socket)  # type: ignore[no-untyped-call]
        return await connect(endpoint, store=store)


@implementer(IBuilder)
class FakeBuilder:
    """Builds nothing, but records what it is asked for.

    :ivar requests: each request with its observer and the Deferred that ends it.
    :ivar arrivals: the same, to be waited for with `get`.
    :ivar cancelled: the requests that were given up.
    """

    def __init__(self, outcome: Callable[[BuildRequest], object] | None = None) -> None:
        """Answer requests with OUTCOME, at once; without it they wait for the test."""
        self._outcome = outcome
        self.requests: list[tuple[BuildRequest, Observer, Deferred[None]]] = []
        self.arrivals: DeferredQueue[tuple[BuildRequest, Observer, Deferred[None]]] = (
            DeferredQueue()
        )
        self.cancelled: list[BuildRequest] = []
        self.closed = False
        self.stopped = False

    def build(self, request: BuildRequest, observer: Observer) -> Deferred[None]:
        """Record REQUEST; see `IBuilder.build`."""
        done: Deferred[None] = Deferred(lambda _: self.cancelled.append(request))
        self.requests.append((request, observer, done))
        self.arrivals.put((request, observer, done))
        if self._outcome is not None:
            try:
                self._outcome(request)
            except Exception:  # noqa: BLE001
                done.errback(Failure())  # type: ignore[no-untyped-call]
            else:
                done.callback(None)
        return done

    def freed(self) -> None:
        """Nothing waits for disk."""

    def close(self) -> None:
        """Record that nothing more is to begin."""
        self.closed = True

    def stop(self) -> Deferred[None]:
        """Give all requests up."""
        self.stopped = True
        for _, _, done in self.requests:
            if not done.called:
                done.errback(CancelledError())
        return succeed(None)


@implementer(IFetcher)
class FakeFetcher:
    """Fetches from a dictionary.

    :ivar bodies: what there is, by URL; other URLs are not found.
    :ivar requests: the URLs that were asked for.
    """

    def __init__(self, bodies: Mapping[str, bytes] | None = None) -> None:
        self.bodies = dict(bodies or {})
        self.requests: list[str] = []

    def start(self) -> None:
        """Do nothing."""

    def fetch(
        self,
        request: Request,
        sink: int,
        *,
        head: Callable[[Head], None] | None = None,
        progress: Callable[[int], None] | None = None,
        source: int | None = None,
    ) -> Deferred[Fetched]:
        """Write the body into SINK, which must take it at once (64 KiB)."""
        self.requests.append(request.url)
        if source is None:
            body = self.bodies.get(request.url)
        else:
            with os.fdopen(source, "rb") as file:
                body = file.read()
        with os.fdopen(sink, "wb") as pipe:
            if body is None:
                return fail(FetchError("http", "the server answers 404 Not Found", 404))
            pipe.write(body[request.offset :])
        left = len(body) - request.offset
        begun = Head(request.url, len(body), request.offset, "")
        if head is not None:
            head(begun)
        if progress is not None:
            progress(left)
        return succeed(Fetched(begun, left, left))

    def lookup(
        self,
        urls: Sequence[str],
        answered: Callable[[int, Answer], None],
        *,
        fields: Mapping[str, str] | None = None,
        verify: bool = False,
        nearest: Reach = Reach.LOOPBACK,
    ) -> Deferred[None]:
        """Answer at once."""
        for number, url in enumerate(urls):
            self.requests.append(url)
            body = self.bodies.get(url)
            answered(number, Answer(404 if body is None else 200, body or b"", None))
        return succeed(None)

    def stop(self) -> Deferred[None]:
        """Do nothing."""
        return succeed(None)


class FakeProcess:
    """The transport of a builder that does not exist.

    :ivar spec: the container it would run in.
    :ivar signals: what it was killed with.
    """

    alone = True

    def __init__(self, pid: int, protocol: IProcessProtocol, spec: SandboxSpec) -> None:
        self.pid = pid
        self.spec = spec
        self.signals: list[str] = []
        self._protocol = protocol
        self._ended = False

    def write_log(self, data: bytes) -> None:
        """Let the builder write DATA."""
        self._protocol.childDataReceived(1, data)

    def exit(self, code: int = 0, signal: int | None = None) -> None:
        """Let the builder end; nothing happens the second time."""
        if self._ended:
            return
        self._ended = True
        error: Any = ProcessTerminated(code, signal)  # type: ignore[no-untyped-call]
        if code == 0 and signal is None:
            error = ProcessDone(0)  # type: ignore[no-untyped-call]
        self._protocol.processExited(Failure(error))  # type: ignore[no-untyped-call]
        self._protocol.processEnded(Failure(error))  # type: ignore[no-untyped-call]

    def signalProcess(self, signalID: str | int) -> None:
        """Record the signal; SIGKILL ends the builder."""
        self.signals.append(str(signalID))
        if signalID in ("KILL", 9):
            self.exit(signal=9)

    def loseConnection(self) -> None:
        """Do nothing."""

    def pauseProducing(self) -> None:
        """Do nothing."""

    def resumeProducing(self) -> None:
        """Do nothing."""


@implementer(ILauncher)
class FakeLauncher:
    """Starts no processes.

    :ivar processes: all that were asked for.
    """

    def __init__(
        self,
        clock: IReactorTime,
        run: Callable[[FakeProcess], None] = lambda process: process.exit(),
    ) -> None:
        """Call RUN in place of each builder; it may write outputs and must see to the end.

        :param clock: calls it in the next turn.
        """
        self._clock = clock
        self._run = run
        self.processes: list[FakeProcess] = []

    def spawn(self, protocol: Any, spec: Any) -> Deferred[FakeProcess]:
        """Pretend to run the builder of SPEC; see `ILauncher.spawn`."""
        process = FakeProcess(len(self.processes) + 100000, protocol, spec)
        self.processes.append(process)
        protocol.makeConnection(process)
        self._clock.callLater(0, self._run, process)
        return succeed(process)

    def kill_user(self, uid: int) -> Deferred[None]:
        """Do nothing."""
        return succeed(None)

    def stop(self) -> Deferred[None]:
        """Kill all that still run."""
        for process in self.processes:
            process.exit(signal=9)
        return succeed(None)
