"""One store that is handed from one daemon to the other and back, at its real place."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.trial.unittest import TestCase

from guixd.client import Client, RequestFailed, connect
from guixd.formats.path import StoreDirectory
from tests.archives import File, Link, Tree, archive
from tests.crash.items import Items, Recipe
from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, VERIFIED, Place
from tests.service.world import set_options

DELETE_DEAD, DELETE_THESE = 2, 3
_DUMP = (
    "SELECT v.path, v.hash, v.narSize, v.deriver FROM ValidPaths AS v ORDER BY 1",
    "SELECT a.path, b.path FROM Refs JOIN ValidPaths AS a ON a.id = referrer"
    " JOIN ValidPaths AS b ON b.id = reference ORDER BY 1, 2",
    "SELECT v.path, o.id, o.path FROM DerivationOutputs AS o JOIN ValidPaths AS v"
    " ON v.id = o.drv ORDER BY 1, 2",
    "SELECT path FROM FailedPaths ORDER BY 1",
)


class Course:
    """Steps of work on one store, each of which any daemon can do."""

    def __init__(self, case: TestCase) -> None:
        self.place = Place(case)
        self.directory = self.place.directory
        self.items = items = Items(StoreDirectory())
        self.shared = bytes(range(256)) * 100
        self.first = items.derive(
            "first",
            "mkdir $out $lib; yes x | head -c 20000 > $lib/data; echo $lib > $out/lib",
            outputs=("out", "lib"),
        )
        out, lib = self.first.outputs["out"], self.first.outputs["lib"]
        self.second = items.derive(
            "second", f"cat {out}/lib {lib}/data > $out", inputs=[self.first]
        )
        self.fixed = items.derive("fixed", "echo fixed > $out", fixed=b"fixed\n")
        self.failing = items.derive("failing", "mkdir $out; exit 3")
        self.also_failing = items.derive("also-failing", "exit 4")
        self.third = items.derive("third", f"cat {lib}/data > $out", inputs=[self.first])

    async def go(self, *daemons: str) -> None:
        """Let one step after the other be done by the DAEMONS in turn."""
        steps: list[Callable[[Client], Awaitable[None]]] = [
            self.add, self.build, self.fail, self.root, self.collect, self.build_again,
            self.optimise, self.add_more, self.delete, self.forget,
        ]  # fmt: skip
        for number, step in enumerate(steps):
            self.place.start(daemons[number % len(daemons)], "--cache-failures")
            client = await self.client()
            try:
                await step(client)
            finally:
                await client.close()
                self.place.stop()

    async def client(self) -> Client:
        from twisted.internet import reactor

        endpoint = UNIXClientEndpoint(reactor, f"{self.directory}/state/daemon-socket/socket")
        client = await connect(endpoint, store=self.items.store)
        await client.set_options(set_options())
        return client

    def dump(self) -> list[Any]:
        """Return what the database has, but for times and numbers, and what is in the store."""
        file = f"{self.directory}/state/db/db.sqlite"
        with closing(sqlite3.connect(file)) as database:
            tables = [database.execute(question).fetchall() for question in _DUMP]
        store = Path(self.directory, "store")
        links = sorted(
            (entry.name, entry.stat().st_nlink) for entry in (store / ".links").iterdir()
        )
        return [*tables, sorted(os.listdir(store)), links]

    # --- steps -----------------------------------------------------------------------

    async def add(self, client: Client) -> None:
        one = await client.add_text("one", b"1")
        two = await client.add_text("two", one.encode(), [one])
        await client.add_text("large", self.shared * 12, [one, two])
        tree: Tree = {b"a": File(self.shared), b"b": File(self.shared, True), b"l": Link(b"a")}
        await client.add_nar("tree", [archive({**tree, b"d": {b"e": File(self.shared)}})])
        await client.add_nar("flat", [archive(File(self.shared))], recursive=False)
        await client.add_nar("sha1", [archive(tree)], algorithm="sha1")

    async def _recipes(self, client: Client, *recipes: Recipe) -> None:
        await client.add_nar("tools", [archive(self.items.tools_tree)])
        for recipe in recipes:
            await client.add_text(recipe.path.name, recipe.text, recipe.references)

    async def build(self, client: Client) -> None:
        await self._recipes(client, self.first, self.second, self.fixed)
        await client.build_paths([self.second.path, self.fixed.path])

    async def fail(self, client: Client) -> None:
        await self._recipes(client, self.failing, self.also_failing)
        for recipe in (self.failing, self.also_failing, self.failing):
            try:
                await client.build_paths([recipe.path])
            except RequestFailed as error:
                assert error.status == 100, error
            else:
                raise AssertionError("a failing build works")

    async def root(self, client: Client) -> None:
        Path(self.directory, "state/second").symlink_to(self.second.outputs["out"])
        await client.add_indirect_root("/var/guix/second")

    async def collect(self, client: Client) -> None:
        await client.collect_garbage(DELETE_DEAD)

    async def build_again(self, client: Client) -> None:
        await self._recipes(client, self.first, self.third)
        await client.build_paths([self.third.path])

    async def optimise(self, client: Client) -> None:
        await client.optimise_store()

    async def add_more(self, client: Client) -> None:
        await self.add(client)
        three = await client.add_text("three", b"3")
        await client.add_text("four", three.encode(), [three])

    async def delete(self, client: Client) -> None:
        await client.collect_garbage(DELETE_THESE, [await client.add_text("gone", b"")])
        await client.collect_garbage(DELETE_THESE, [self.third.outputs["out"]])

    async def forget(self, client: Client) -> None:
        await client.clear_failed_paths([self.failing.outputs["out"]])
        failed = await client.failed_paths()
        assert failed == (self.also_failing.outputs["out"],), failed


@requires_guest
class SwapTests(TestCase):
    timeout = 120

    def test_swap(self) -> Deferred[None]:
        """S9, S12, G1: in the end the store is as if the stock daemon had done all of it."""
        return Deferred.fromCoroutine(self._swap())

    async def _swap(self) -> None:
        stock, swapped, other = Course(self), Course(self), Course(self)
        await stock.go(STOCK)
        await swapped.go(GUIXD, STOCK)
        await other.go(STOCK, GUIXD)
        wanted = stock.dump()
        for course in (swapped, other):
            for ours, theirs in zip(course.dump(), wanted, strict=True):
                self.assertEqual(ours, theirs)
            for daemon in (GUIXD, STOCK):
                course.place.start(daemon)
                checked = course.place.run("guix", "gc", "--verify=contents")
                self.assertEqual(checked.err.splitlines(), VERIFIED)
                course.place.stop()
