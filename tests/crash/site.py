"""A store, the daemon that serves it and dies again and again, and its clients."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.error import ConnectError
from twisted.trial.unittest import TestCase

from guixd.build.leftovers import RUNNING
from guixd.client import Client, Disconnected, connect
from guixd.formats.path import StoreDirectory
from guixd.settings import Directories
from guixd.signatures import read_key_pair
from tests.crash.inspection import leftovers, problems
from tests.crash.items import BUSYBOX, Items
from tests.crash.nursery import Death, Nursery
from tests.crash.work import DELETE_DEAD, Task, Work
from tests.service.world import EndpointAs
from tests.signatures.keys import install
from tests.support import has_user_namespaces, is_root, requires, temporary_directory

reactor: Any = installed
FIRST_UID = 3_000_000 + 16 * os.getpid()
STRANGER = 61998
PATIENCE = 10.0
"""Seconds after the clients have lost the daemon in which it must be dead."""

requires_builders = requires(
    lambda: os.path.exists(BUSYBOX) and (is_root() or has_user_namespaces()),
    "busybox-static, and root or unprivileged user namespaces",
)


class Site:
    """One store.

    :ivar items: all that its clients make.
    :ivar kills: how often its daemon has been killed.
    :ivar begun: the tasks that each of the clients began last, the last of which may be undone.
    """

    def __init__(self, case: TestCase, *options: str) -> None:
        self.directory = top = temporary_directory(case, world_readable=True)
        self.directories = Directories(
            store=f"{top}/store",
            state=f"{top}/var",
            log=f"{top}/log",
            database=f"{top}/var/db",
            configuration=f"{top}/etc",
            temporary=f"{top}/tmp",
        )
        for name in ("tmp", "links", "mirror/nar"):
            os.makedirs(f"{top}/{name}")
        install(self.directories.configuration, acl=True)
        self._keys = read_key_pair(self.directories.configuration)
        self.kills = 0
        self.begun: list[list[Task]] = []
        self.items = Items(StoreDirectory(self.directories.store))
        mirror = f"--substitute-urls=file://{top}/mirror"
        self._arguments = ["--max-jobs=2", mirror, *options]
        if is_root():
            self._arguments.append(f"--build-uids={FIRST_UID}-{FIRST_UID + 3}:64001")
        self._environ = {
            "PATH": os.environ["PATH"],
            "NIX_STORE_DIR": self.directories.store,
            "GUIX_STATE_DIRECTORY": self.directories.state,
            "GUIX_LOG_DIRECTORY": self.directories.log,
            "GUIX_CONFIGURATION_DIRECTORY": self.directories.configuration,
            "TMPDIR": self.directories.temporary,
        }
        self._nursery = Nursery.shared()
        self._log = f"{top}/daemon.log"
        self._runs = False
        case.addCleanup(self.end)

    def work(self, random: Random, label: str) -> Work:
        """Return a maker of tasks."""
        database = f"{self.directories.database}/db.sqlite"
        return Work(self.items, self.directory, database, self._keys, random, label, self._stranger)

    def start(self) -> None:
        """Start the daemon."""
        self._nursery.start(self._arguments, self._environ, self._log)
        self._runs = True

    def arm(self, fault: str = "", calls: int = 0) -> None:
        """Let the daemon die later; see `Nursery.arm`."""
        self._nursery.arm(fault, calls)

    def end(self, patience: float = 0) -> Death | None:
        """Kill the daemon unless it dies within PATIENCE seconds; nothing may be left of it."""
        if not self._runs:
            return None
        self._runs = False
        death = self._nursery.end(patience)
        self.kills += 1
        if death.survivors:
            raise AssertionError(f"the daemon's death is survived by {death.survivors}")
        log = Path(self._log).read_text()
        if "Traceback" in log:
            raise AssertionError(log)
        return death

    async def client(self) -> Client:
        """Return a new client.

        :raises Disconnected: there is no daemon, or not for long.
        """
        return await self._connect(UNIXClientEndpoint(reactor, self.directories.socket))

    async def _stranger(self) -> Client:
        if not is_root():
            return await self.client()
        return await self._connect(EndpointAs(self.directories.socket, STRANGER))

    async def _connect(self, endpoint: Any) -> Client:
        try:
            return await connect(endpoint, store=self.items.store)
        except (ConnectError, OSError) as error:
            raise Disconnected(f"no daemon: {error}") from error

    async def do(self, *scripts: Sequence[Task]) -> bool:
        """Do the tasks of each script by a client of its own.

        :return: whether all was done before the daemon died; `begun` has what was begun.
        """
        self.begun = [[] for _ in scripts]
        work = [
            Deferred.fromCoroutine(self._do(script, begun))
            for script, begun in zip(scripts, self.begun, strict=True)
        ]
        return all(await gatherResults(work, consumeErrors=True))

    async def _do(self, script: Sequence[Task], begun: list[Task]) -> bool:
        try:
            client = await self.client()
        except Disconnected:
            return False
        try:
            for task in script:
                begun.append(task)
                await task(client)
        except Disconnected:
            return False
        finally:
            await client.close()
        return True

    async def keep_promises(self) -> None:
        """Raise AssertionError unless what was said to be valid before a death still is."""
        promised = self.items.promised
        client = await self.client()
        try:
            lost = promised.difference(await client.valid_paths(sorted(promised)))
        finally:
            await client.close()
        if lost:
            raise AssertionError(f"no longer valid: {sorted(lost)}")

    def inspect(self) -> None:
        """Raise AssertionError unless all that is valid is right."""
        found = problems(self.directories, self.items)
        if found:
            raise AssertionError("\n".join(found))

    def forget_kept(self) -> None:
        """Remove the directories of failed builds that were kept."""
        for entry in Path(self.directories.temporary).iterdir():
            if stat.S_IMODE(entry.stat().st_mode) != RUNNING:
                shutil.rmtree(entry)

    async def collect(self) -> None:
        """Collect all garbage, when nobody else is connected."""
        self.items.promised.clear()
        client = await self.client()
        try:
            await client.collect_garbage(DELETE_DEAD)
        finally:
            await client.close()

    def leftovers(self) -> list[str]:
        """Return what is left of builds, and of the store but for valid items."""
        temporary = self.directories.temporary
        # An empty one may be somebody's who is about to fill it.
        builds = [name for name in os.listdir(temporary) if os.listdir(f"{temporary}/{name}")]
        return [*builds, *leftovers(self.directories)]
