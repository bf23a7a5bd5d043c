"""A launcher that starts nothing: tests say what each builder does and when it ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessDone, ProcessTerminated
from twisted.python.failure import Failure

from guixd.sandbox.spec import SandboxSpec


class FakeBuilder:
    """The process and transport of a builder that a test plays."""

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
            path = (self.spec.root or "") + variables[name]
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_text(variables.get("contents", self.name))
            os.chmod(path, 0o644)
            if self.spec.ids is not None:
                os.chown(path, self.spec.ids.uid, self.spec.ids.gid)
        self._end(ProcessTerminated(code, None, code << 8) if code else ProcessDone(0))

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
