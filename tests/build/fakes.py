"""A launcher that starts nothing, threads that wait, and substitutes from nowhere.

Tests say how all ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.error import ProcessDone, ProcessTerminated
from twisted.python.failure import Failure

from guixd.build.claims import Claims
from guixd.build.results import Result, Status
from guixd.build.substitution import Attachment
from guixd.formats.narinfo import Narinfo
from guixd.formats.path import StorePath
from guixd.net.narinfos import Offer
from guixd.net.places import Source
from guixd.sandbox.spec import SandboxSpec
from guixd.store.items import Registration
from guixd.store.local import LocalStore


class FakeBuilder:
    """The process and transport of a builder that a test plays."""

    alone = True

    def __init__(self, protocol: Any, spec: SandboxSpec, pid: int) -> None:
        self.pid = pid
        self.spec = spec
        self.name = dict(spec.environment)["name"]
        self.killed = False
        self.paused = False
        self.over = False
        self._protocol = protocol

    def say(self, text: str) -> None:
        """Write to the log."""
        self._protocol.childDataReceived(1, text.encode())

    def finish(self, code: int = 0) -> None:
        """Make all outputs and exit with CODE."""
        variables = dict(self.spec.environment)
        for name in variables.get("outputs", "out").split():
            path = self.outside(variables[name])
            Path(path).write_text(variables.get("contents", self.name))
            os.chmod(path, 0o644)
            if self.spec.ids is not None:
                os.chown(path, self.spec.ids.uid, self.spec.ids.gid)
        self._end(ProcessTerminated(code, None, code << 8) if code else ProcessDone(0))

    def outside(self, path: str) -> str:
        """Return the name on the host of the new file PATH, as the builder names it."""
        return next(
            (
                bind.source + path.removeprefix(bind.target)
                for bind in reversed(self.spec.binds)
                if path.startswith(bind.target + "/")
            ),
            path,
        )

    def signalProcess(self, signal: str) -> None:
        self.killed = True
        if not self.over:
            self._end(ProcessTerminated(None, 9, 9))

    def _end(self, error: Exception) -> None:
        self.over = True
        reason = Failure(error)
        self._protocol.processExited(reason)
        self._protocol.processEnded(reason)

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def loseConnection(self) -> None:
        pass


class Held:
    """Threads in which nothing is done until the test says so.

    :param name: of a function; other ones are called at once, unless it is empty.
    :ivar begun: fires when there is something to do.
    """

    def __init__(self, name: str = "") -> None:
        self._name = name
        self.steps: list[Callable[[], None]] = []
        self.begun: Deferred[None] = Deferred()

    def __call__(self, function: Callable[..., Any], /, *arguments: Any) -> Deferred[Any]:
        if self._name not in ("", function.__name__):
            return maybeDeferred(function, *arguments)
        done: Deferred[Any] = Deferred()
        self.steps.append(lambda: maybeDeferred(function, *arguments).chainDeferred(done))
        if not self.begun.called:
            self.begun.callback(None)
        return done

    def go_on(self) -> None:
        """Do all there is to do."""
        while self.steps:
            self.steps.pop(0)()


class FakeLauncher:
    """Keeps the builders that were started, by the name of their derivation.

    :param auto: exit codes of builders that end at once, by name; `None` lets
        all wait for the test.
    """

    def __init__(self, auto: dict[str, int] | None = None) -> None:
        self.auto = auto
        self.started: list[FakeBuilder] = []
        self.killed_users: list[int] = []

    def spawn(self, protocol: Any, spec: SandboxSpec) -> Deferred[Any]:
        builder = FakeBuilder(protocol, spec, 1000 + len(self.started))
        self.started.append(builder)
        ready: Deferred[Any] = Deferred()
        ready.callback(builder)
        if self.auto is not None:
            builder.finish(self.auto.get(builder.name, 0))
        return ready

    def kill_user(self, uid: int) -> Deferred[None]:
        self.killed_users.append(uid)
        return succeed(None)

    def stop(self) -> Deferred[None]:
        return succeed(None)

    def __getitem__(self, name: str) -> FakeBuilder:
        """Return the last builder started for the derivation NAME."""
        return next(b for b in reversed(self.started) if b.name == name)

    @property
    def names(self) -> list[str]:
        """What was started, in order."""
        return [builder.name for builder in self.started]

    @property
    def running(self) -> list[str]:
        """What runs."""
        return [builder.name for builder in self.started if not builder.over]


class FakeDownload:
    """A substitution that a test plays."""

    stuck = False

    def __init__(self, store: LocalStore, offer: Offer) -> None:
        self.path = offer.narinfo.path
        self.dropped = False
        self.over = False
        self.attachment = Attachment(cast(Any, None))
        self._store = store
        self._offer = offer

    def finish(self, contents: str = "") -> None:
        """Make the item valid."""
        Path(self.path).write_text(contents or self.path.name)
        known = self._offer.narinfo
        self._store.register(
            [Registration(self.path, known.nar_hash, known.nar_size, known.references)]
        )
        self._end(Result(Status.SUBSTITUTED))

    def fail(self) -> None:
        """End without the item."""
        self._end(Result(Status.MISC_FAILURE, f"no {self.path.name}"))

    def detach(self, attachment: Attachment) -> None:
        self.dropped = self.over = True

    def _end(self, result: Result) -> None:
        self.over = True
        self.attachment.result.callback(result)


class FakeSubstitutes:
    """Keeps the downloads that were begun, by the names of the items.

    :ivar store: where items go; to be set.
    :ivar offers: what there is.
    """

    def __init__(self) -> None:
        self.store: LocalStore
        self.claims = Claims()
        self.started: list[FakeDownload] = []
        self.searches = 0
        self.offers: dict[StorePath, Offer] = {}

    def offer(self, path: StorePath, *references: StorePath) -> StorePath:
        """Have PATH; return it."""
        known = Narinfo(path, "sha256", bytes(32), 120, frozenset(references))
        self.offers[path] = Offer(known, (Source("http://there", known),))
        return path

    def __getitem__(self, name: str) -> FakeDownload:
        """Return the last download of the item NAME."""
        return next(d for d in reversed(self.started) if d.path.name == name)

    @property
    def names(self) -> list[str]:
        """What was begun, in order."""
        return [download.path.name for download in self.started]

    @property
    def running(self) -> list[str]:
        """What runs."""
        return [download.path.name for download in self.started if not download.over]

    async def find(self, paths: Any, _options: object, _observer: object) -> dict[StorePath, Offer]:
        self.searches += 1
        return {path: self.offers[path] for path in paths if path in self.offers}

    def attach(self, offer: Offer, *_: object) -> tuple[FakeDownload, Attachment]:
        download = FakeDownload(self.store, offer)
        self.started.append(download)
        return download, download.attachment

    def stop(self) -> Deferred[None]:
        return succeed(None)
