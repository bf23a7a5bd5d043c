"""Steps in threads whose caller gives up before they end (W21, U12)."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase

from guixd.build.boxes import Boxes
from guixd.build.container import Host
from guixd.build.download import Download
from guixd.build.threads import to_the_end
from guixd.build.transfer import Transfer
from guixd.formats.derivation import Derivation, Output
from guixd.formats.path import StoreDirectory
from guixd.net.places import Place
from guixd.settings import this_system
from guixd.testing import FakeFetcher
from tests.build.fakes import FakeLauncher, Held
from tests.support import open_files, temporary_directory

URL = "http://server/x"
STORE = StoreDirectory("/store")
PATH = STORE.child("0" * 32 + "-x")


class WaitTests(SynchronousTestCase):
    def test_cancelled(self) -> None:
        """However often the caller is cancelled, the end is awaited; it is told once to hurry."""
        threads, told = Held(), list[str]()
        waiting = Deferred.fromCoroutine(
            to_the_end(threads(told.append, "done"), lambda: told.append("hurry"))
        )
        for _ in range(3):
            waiting.cancel()
            self.assertNoResult(waiting)
        threads.go_on()
        self.failureResultOf(waiting, CancelledError)
        self.assertEqual(told, ["hurry", "done"])

    def test_outcome(self) -> None:
        """Who stays gets what the thread returns, or what it raises."""
        self.assertEqual(self.successResultOf(self.wait(int)), 0)
        self.failureResultOf(self.wait(dict[str, str]().pop, "x"), KeyError)

    def wait(self, function: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
        threads = Held()
        waiting = Deferred.fromCoroutine(to_the_end(threads(function, *arguments)))
        self.assertNoResult(waiting)
        threads.go_on()
        return waiting

    def test_box(self) -> None:
        """W21: a build tree that is made for nobody is removed, and the build user given back."""
        user, top = SimpleNamespace(uid=os.getuid(), gid=os.getgid()), temporary_directory(self)
        released: list[Any] = []
        users: Any = SimpleNamespace(acquire=lambda: succeed(user), release=released.append)
        threads, launcher, before = Held(), FakeLauncher(), open_files()
        boxes = Boxes(launcher, users, threads, top, Host(1, 1))
        opening = Deferred.fromCoroutine(boxes.open(PATH, {"file": b""}).__aenter__())
        opening.cancel()
        threads.go_on()
        self.failureResultOf(opening, CancelledError)
        self.assertEqual((os.listdir(top), open_files()), ([], before))
        self.assertEqual((released, launcher.killed_users), ([user], [user.uid] * 2))


class DownloadTests(TestCase):
    """The last step of a download uses files that are closed or removed afterwards."""

    timeout = 30

    def setUp(self) -> None:
        self.threads = Held("finish")
        self.directory = temporary_directory(self)

    async def give_up(self, work: Any) -> None:
        """Cancel WORK when it waits for a thread; it ends after that."""
        running = Deferred.fromCoroutine(work)
        await self.threads.begun
        await deferLater(reactor, 0)
        running.cancel()
        self.assertNoResult(running)
        self.threads.go_on()
        await self.assertFailure(running, CancelledError)

    async def test_file(self) -> None:
        """W21: so it is with a file, whose hash is found in the end."""
        output = Output(PATH, "r:sha256", "0" * 64)
        variables = {"url": f'"{URL}"', "out": str(PATH)}
        drv = Derivation({"out": output}, {}, (), this_system(), "builtin:download", (), variables)
        job: Any = SimpleNamespace(
            drv=drv, path=PATH, options=SimpleNamespace(follow_downloads=False)
        )
        tools: Any = SimpleNamespace(
            reactor=reactor, threads=self.threads, fetcher=FakeFetcher({URL: b"body"}), nearest=0
        )
        download = Download(tools, job, self.directory, [], lambda text: None, lambda text: None)
        await self.give_up(download.run())
        self.assertEqual(os.listdir(self.directory), [PATH.base])

    async def test_substitute(self) -> None:
        """U12: so it is with an archive, whose file is shared in the end."""
        steps: list[str] = []

        def finish() -> None:
            steps.append("finished")

        incoming: Any = SimpleNamespace(path=PATH, nar_size=4, left=0, feed=len, finish=finish)
        place = Place(URL, "server", "none", 4)
        fetcher = FakeFetcher({URL: b"body"})
        transfer = Transfer(
            reactor, self.threads, fetcher, place, incoming, lambda event: None, lambda *_: None
        )
        await self.give_up(transfer.run())
        self.assertEqual(steps, ["finished"])
