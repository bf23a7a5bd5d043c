"""Running programs of the daemon's own as build users, for downloads that need one.

Such a program deals with what strangers send, in a box (`gitbox`, `treebox`).  Unlike a
builder it is a part of a builtin builder, which is what limits and logs of builds are about.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from guixd.build.builder import Launcher
from guixd.build.container import Host
from guixd.build.threads import Threads, to_the_end
from guixd.build.users import BuildUser, BuildUserPool
from guixd.build.workspace import Workspace
from guixd.formats.path import StorePath
from guixd.sandbox.spec import SandboxSpec


class _Watch(ProcessProtocol):
    """Passes on what a program writes.

    :ivar ended: fires when it has ended, with how in a tuple.
    """

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self.ended: Deferred[tuple[Failure]] = Deferred()
        self._output = output

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._output(data)

    def processEnded(self, reason: Failure) -> None:
        self.ended.callback((reason,))


@dataclass(frozen=True, slots=True)
class Boxes:
    """Where such programs run.

    :ivar users: `None` if they run as the daemon's own user.
    :ivar temporary: where their directories are made.
    """

    launcher: Launcher
    users: BuildUserPool | None
    threads: Threads
    temporary: str
    host: Host

    @property
    def usable(self) -> bool:
        """Whether they can be run: never as root."""
        return self.users is not None or self.host.uid != 0

    @asynccontextmanager
    async def open(self, path: StorePath, files: Mapping[str, bytes]) -> AsyncIterator[Box]:
        """Yield a place for a program, for a download of the derivation PATH.

        :param files: what is in its directory, contents by name.
        :raises OSError: or `GuixdError`: there is none.
        """
        user, made = None, list[Workspace]()

        def make() -> None:
            made.append(
                Workspace.create(
                    path, temporary=self.temporary, use_chroot=False, user=user, files=files
                )
            )

        def remove() -> None:
            for workspace in made:
                workspace.remove()

        async with AsyncExitStack() as stack:
            if self.users is not None:
                user = await self.users.acquire()
                stack.callback(self.users.release, user)
            stack.push_async_callback(self.threads, remove)
            if user is not None:
                stack.push_async_callback(self.launcher.kill_user, user.uid)
                await self.launcher.kill_user(user.uid)
            await to_the_end(self.threads(make))
            yield Box(self, user, made[0])


@dataclass(frozen=True, slots=True)
class Box:
    """A place for one program.

    :ivar user: who it runs as; `None` for the daemon's own user.
    """

    boxes: Boxes
    user: BuildUser | None
    workspace: Workspace

    @property
    def uid(self) -> int:
        """Whose the files are that it makes."""
        return self.boxes.host.uid if self.user is None else self.user.uid

    async def run(self, spec: SandboxSpec, output: Callable[[bytes], None]) -> bool:
        """Run the program of SPEC; return whether it succeeded.

        Nothing of it is left then, nor if the caller is cancelled.

        :param output: gets what it writes.
        """
        watch = _Watch(output)
        launcher = self.boxes.launcher
        process = await launcher.spawn(watch, spec)
        (reason,) = await to_the_end(watch.ended, lambda: self._kill(process))
        if self.user is not None:
            await launcher.kill_user(self.user.uid)
        return isinstance(reason.value, ProcessDone)

    def _kill(self, process: Any) -> None:
        try:
            process.signalProcess("KILL")
        except ProcessExitedAlready:
            pass
        if self.user is None:
            process.loseConnection()  # Others may keep the pipe open.
        else:
            self.boxes.launcher.kill_user(self.user.uid)
