"""Interfaces between the layers, and for who embeds guixd or replaces a part."""

from __future__ import annotations

from typing import Any

from zope.interface import Interface


class IBuildObserver(Interface):
    """A client's view of the builds that it wants.  Methods never block or raise."""

    def log(level: int, text: str) -> None:
        """One or more whole lines of the daemon's own, without the last newline."""

    def trace(line: str, instead: str = "") -> None:
        """A machine-readable line beginning with `@ `, without a newline.

        Who gets no such lines reads INSTEAD, if that is not empty.
        """

    def output(pid: int, chunk: bytes) -> None:
        """What the builder PID of a build wrote."""

    def last_words(lines: Any, file: str) -> None:
        """The last lines of a failed build's log, and its file, for who has not been told."""

    def full() -> object:
        """None, or a Deferred that fires when the client has read enough to take more output.

        Asked before each `output`; while it waits this client's part of the log
        is kept for it, and a builder that all of its clients fall behind is held.
        """


class IBuilder(Interface):
    """Builds derivations (layer `build`)."""

    def build(request: Any, observer: Any) -> Any:
        """Carry out a `build.request.BuildRequest` for an `IBuildObserver`.

        :return: a Deferred that fires with None, or fails with `BuildError` (or
            another `GuixdError`); cancelling it gives the builds up.
        """

    def freed() -> None:
        """Something was removed from the disk, which builds may wait for."""

    def close() -> None:
        """Begin no more builds; those that run go on."""

    def stop() -> object:
        """End all builds; the Deferred fires when nothing of them is left."""


class ILauncher(Interface):
    """Starts builders in their containers."""

    def spawn(protocol: object, spec: object) -> object:
        """Run the builder of a `SandboxSpec` under an `IProcessProtocol`.

        What the builder writes reaches `childDataReceived(1, data)`; at the end
        `processExited` and, when the log pipe is at its end too, `processEnded`
        get a `ProcessDone` or `ProcessTerminated`.

        :return: a Deferred that fires with the `IProcessTransport` (its `pid`
            is the builder's on the host, its `alone` whether no process of its build
            user is left since it has ended) when set-up is done, just before the
            program is run, or fails with `SandboxError`.
        """

    def kill_user(uid: int) -> object:
        """Kill every process of UID; the Deferred fires when none is left."""

    def stop() -> object:
        """Kill all builders and end; the Deferred fires when that is done."""


class IFetcher(Interface):
    """Gets bytes from servers, in a process without the daemon's privileges."""

    def start() -> None:
        """Make ready for the first request, which may also come without this."""

    def fetch(
        request: Any,
        sink: int,
        *,
        head: Any = None,
        progress: Any = None,
        source: int | None = None,
    ) -> Any:
        """Fetch the body of a `net.requests.Request` into the pipe SINK, which is closed.

        :param head: called with the `Head` when the body begins, and with that of
            the rest whenever it goes on after it broke off.
        :param progress: called with the compressed bytes received, now and then.
        :param source: the descriptor of a file that has the body, to be undone; it is closed.
        :return: a Deferred that fires with a `Fetched` or fails with `FetchError`;
            cancelling it gives up.
        """

    def lookup(
        urls: Any, answered: Any, *, fields: Any = None, verify: bool = False, nearest: Any = 0
    ) -> Any:
        """Ask for URLS, whose bodies are short.

        :param answered: called with the index of each URL and its `Answer`.
        :param nearest: a `net.reach.Reach`, which the servers must not be nearer than.
        :return: a Deferred that fires when all are answered; cancelling it gives up.
        """

    def stop() -> Any:
        """Give everything up; the Deferred fires when nothing is left."""
