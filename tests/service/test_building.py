"""Building over a socket, with a builder that only records."""

from __future__ import annotations

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.request import BuildMode, Level, Wanted
from guixd.client import RequestFailed
from guixd.errors import BuildError, NotInStore
from guixd.formats import operations as op
from guixd.formats.messages import Failed, Last, Next
from guixd.formats.path import StoreDirectory
from guixd.service.building import wanted
from tests.service.world import DaemonCase, messages, set_options


class ItemTests(SynchronousTestCase):
    def test_items(self) -> None:
        """P16: what follows `!` names outputs."""
        store = StoreDirectory()
        drv = store.child("a" * 32 + "-x.drv")
        self.assertEqual(wanted(store, drv), Wanted(drv))
        self.assertEqual(wanted(store, drv + "!"), Wanted(drv))
        self.assertEqual(wanted(store, drv + "!out,dev"), Wanted(drv, frozenset(("out", "dev"))))

    def test_short(self) -> None:
        """P32: a name without a hash part is an error."""
        self.assertRaises(NotInStore, wanted, StoreDirectory(), "/gnu/store/x.drv")


class BuildTests(DaemonCase):
    tcp = True
    options = {"max_jobs": 3, "cores": 2}

    async def test_request(self) -> None:
        """The builder gets the items and the options of the client."""
        builder = self.builder
        builder._outcome = lambda request: None
        client = await self.client()
        drv = self.path("x.drv")
        await client.build_paths([drv])
        await client.set_options(set_options(("build-cores", "7"), keep_going=True))
        await client.build_paths([drv + "!out", self.path("plain")], mode=2)
        (first, _, _), (second, _, _) = builder.requests
        self.assertEqual(first.wanted, (Wanted(drv),))
        self.assertEqual((first.mode, first.options.max_jobs), (BuildMode.NORMAL, 3))
        self.assertEqual((first.options.cores, first.options.client_uid), (2, self.uid))
        self.assertEqual(
            set(second.wanted), {Wanted(drv, frozenset(("out",))), Wanted(self.path("plain"))}
        )
        self.assertEqual((second.mode, second.options.cores), (BuildMode.CHECK, 7))
        self.assertTrue(second.options.keep_going)

    @property
    def uid(self) -> int:
        return self.daemon.service.daemon.uid

    async def test_failure(self) -> None:
        """P24: the client gets text and status of a failure, and goes on."""

        def fail(_request: object) -> None:
            raise BuildError("build of `x' failed", 100)

        self.builder._outcome = fail
        client = await self.client()
        error = await self.assertFailure(client.build_paths([self.path("x.drv")]), RequestFailed)
        self.assertEqual((error.text, error.status), ("build of `x' failed", 100))
        self.assertEqual(len(await client.builtin_builders()), 2)

    async def test_modes(self) -> None:
        """P17: only the trusted may repair, everybody may check; others are normal."""
        self.builder._outcome = lambda request: None
        drv = self.path("x.drv")
        client = await self.client()
        await client.build_paths([drv], mode=1)
        remote = await self.client(self.port)
        await remote.build_paths([drv], mode=2)
        await remote.build_paths([drv], mode=77)
        modes = [request.mode for request, _, _ in self.builder.requests]
        self.assertEqual(modes, [BuildMode.REPAIR, BuildMode.CHECK, BuildMode.NORMAL])
        error = await self.refused(op.BuildPaths((drv,), 1), endpoint=self.port)
        self.assertIn("privileged operation", error.text)

    async def test_remote(self) -> None:
        """A client on TCP owns no build trees and cannot have them kept."""
        self.builder._outcome = lambda request: None
        client = await self.client(self.port)
        await client.set_options(set_options(keep_failed=True))
        await client.build_paths([self.path("x.drv")])
        ((request, _, _),) = self.builder.requests
        self.assertEqual((request.options.keep_failed, request.options.client_uid), (False, None))

    async def test_log(self) -> None:
        """P25: what a build says reaches the client, in order, before the reply."""
        client = await self.raw(
            None,
            set_options(("multiplexed-build-output", "true")),
            op.BuildPaths((self.path("x.drv"),)),
        )
        _, observer, done = await self.builder.arrivals.get()
        observer.trace("@ build-started x")
        observer.output(12, b"hello\n")
        observer.log(Level.ERROR, "failed")
        observer.log(Level.INFO, "not wanted")
        done.errback(BuildError("no", 1))
        client.transport.write(b"\0" * 8)
        observer_messages = messages(await client.closed)
        self.assertEqual(
            observer_messages,
            [
                Last(),
                Last(),
                Next(b"@ build-started x\n"),
                Next(b"@ build-log 12 6\nhello\n"),
                Next(b"failed\n"),
                Failed("no", 1),
                Failed("invalid operation 0", 1),
            ],
        )
        observer.log(Level.ERROR, "too late")

    async def test_leaving(self) -> None:
        """P27: who leaves gives its builds up."""
        client = await self.raw(None, op.BuildPaths((self.path("x.drv"),)))
        request, _, done = await self.builder.arrivals.get()
        ended: Deferred[None] = Deferred()
        done.addBoth(lambda _: ended.callback(None))
        client.transport.loseConnection()
        await ended
        self.assertEqual(self.builder.cancelled, [request])

    async def test_stop(self) -> None:
        """Stopping the daemon ends builds, connections and the builder."""
        client = await self.client()
        building = client.build_paths([self.path("x.drv")])
        await self.builder.arrivals.get()
        await deferLater(reactor, 0)  # out of the call of the builder
        await self.daemon.stop()
        self.assertEqual(len(self.builder.cancelled), 1)
        self.assertTrue(self.builder.stopped)
        await self.assertFailure(building, Exception)

    async def test_ensure(self) -> None:
        """B5, op 10: a valid path is fine, another cannot be substituted."""
        self.builder._outcome = lambda _request: None
        client = await self.client()
        path = await client.add_text("x", b"y")
        await client.ensure_path(path)
        error = await self.assertFailure(client.ensure_path(self.path("x")), RequestFailed)
        self.assertEqual(error.status, 1)
