"""Lookups with one cache for all (spec: substitutes §3 to §6)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, fail, maybeDeferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import FetchError
from guixd.formats.narinfocache import CacheEntry, directory_name
from guixd.formats.path import StoreDirectory, StorePath
from guixd.net import narinfos
from guixd.net.cachefiles import HOUSEKEEPING, CacheFiles
from guixd.net.narinfos import DOWN, TTL_ABSENT, TTL_FOUND, Narinfos, Offer
from guixd.net.requests import Answer
from tests.support import temporary_directory

STORE = StoreDirectory("/gnu/store")
SERVER = "http://127.0.0.1:18099"
# What the stock helper calls the directory of that server.
DIRECTORY = "yfdvxsftdrthtcgkf3u7vwk3oxfcf2daekv7vlzk7jwn7pglcv2q"
HASH = "1dhm6dssrphhf4agc4fyi2f2lwxrdzz0fqx2ddfnc33zi0mnfxap"


def path(letter: str) -> StorePath:
    return STORE.child(letter * 32 + "-item")


def text(of: StorePath, references: str = "") -> bytes:
    return (
        f"StorePath: {of}\nNarHash: sha256:{HASH}\nNarSize: 120\nReferences: {references}\n"
        "Signature: 1;host;good\nURL: nar/x\n"
    ).encode()


class Lookups:
    """Answers questions when told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.known: dict[str, Answer] = {}
        self.held: list[Callable[[], None]] = []
        self.holds = False
        self.broken = ""

    def lookup(
        self, urls: Sequence[str], answered: Callable[[int, Answer], None]
    ) -> Deferred[None]:
        self.asked += urls
        if self.broken:
            return fail(FetchError("fetcher", self.broken))
        done: Deferred[None] = Deferred()

        def answer() -> None:
            for index, url in enumerate(urls):
                answered(index, self.known.get(url, Answer(404, b"", None)))
            done.callback(None)

        if self.holds:
            self.held.append(answer)
        else:
            answer()
        return done


class NarinfosTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.lookups = Lookups()
        self.clock = Clock()
        self.narinfos = self.make()

    def make(self, threads: Callable[..., Deferred[Any]] = maybeDeferred) -> Narinfos:
        return Narinfos(
            self.clock,
            threads,
            self.lookups,
            STORE,
            self.directory,
            lambda all_: [each.signature.endswith("good") for each in all_],
            lambda: 10**9 + self.clock.seconds(),
        )

    def find(
        self,
        *paths: StorePath,
        servers: Sequence[str] = (SERVER,),
        told: Callable[[str], Any] = str,
    ) -> dict[StorePath, Offer]:
        found = Deferred.fromCoroutine(self.narinfos.find(paths, servers, told))
        return self.successResultOf(found)

    def serve(self, letter: str, **fields: Any) -> StorePath:
        item = path(letter)
        answer = Answer(200, text(item), fields.get("max_age"))
        self.lookups.known[f"{SERVER}/{item.hash_part}.narinfo"] = answer
        return item

    def test_kept(self) -> None:
        """U15: what was asked is not asked again, by nobody, until it is too old."""
        item, none = self.serve("a"), path("b")
        self.assertEqual(set(self.find(item, none)), {item})
        self.assertEqual(set(self.find(item, none)), {item})
        self.assertEqual(len(self.lookups.asked), 2)
        self.narinfos = self.make()  # from the files, as after a restart
        self.assertEqual(set(self.find(item, none)), {item})
        self.assertEqual(len(self.lookups.asked), 2)
        self.clock.advance(TTL_ABSENT + 1)
        self.assertEqual(set(self.find(item, none)), {item})
        self.assertEqual(len(self.lookups.asked), 3)
        self.clock.advance(TTL_FOUND)
        self.find(item)
        self.assertEqual(len(self.lookups.asked), 4)

    def test_max_age(self) -> None:
        """U15: the server says how long its answers hold."""
        item = self.serve("a", max_age=10)
        self.find(item)
        self.clock.advance(9)
        self.find(item)
        self.assertEqual(len(self.lookups.asked), 1)
        self.clock.advance(2)
        self.find(item)
        self.assertEqual(len(self.lookups.asked), 2)

    def test_files(self) -> None:
        """U15: files as the stock helper writes them are read; garbage is passed over."""
        item = path("a")
        value = text(item).decode().replace("\n", "\\n")
        directory = Path(self.directory, DIRECTORY)
        directory.mkdir(parents=True)
        (directory / item.hash_part).write_text(
            f'(narinfo (version 2) (cache-uri "{SERVER}") (date 1000000000) (ttl 100)'
            f' (value "{value}"))'
        )
        (directory / path("b").hash_part).write_text("(narinfo (version")
        self.assertEqual(set(self.find(item, path("b"))), {item})
        self.assertEqual(self.lookups.asked, [f"{SERVER}/{path('b').hash_part}.narinfo"])
        self.assertEqual(sorted(os.listdir(directory)), ["a" * 32, "b" * 32])
        written = directory / path("b").hash_part
        self.assertIn("#f", written.read_text())
        self.assertEqual(written.stat().st_mode & 0o777, 0o600)  # URLs may have passwords

    def test_false_files(self) -> None:
        """U8, U15: a file about another item, or from a time to come, is no answer."""
        now = 10**9
        for letter, about, date in (("a", "b", now), ("c", "c", now + TTL_FOUND + 1)):
            item = self.serve(letter)
            entry = CacheEntry(SERVER, date, 3600, text(path(about)))
            CacheFiles(self.directory).write(SERVER, {item.hash_part: entry})
            self.assertEqual(set(self.find(item)), {item})
            self.assertEqual(self.lookups.asked.pop(), f"{SERVER}/{item.hash_part}.narinfo")
        self.assertEqual(self.lookups.asked, [])

    def test_housekeeping(self) -> None:
        """U15: old files go, also while the daemon runs for long."""
        latest = Path(self.directory, "last-expiry-cleanup")
        for day in (0, HOUSEKEEPING // 86400):
            self.clock.advance(day * 86400)
            self.find(self.serve("a"))
            self.assertEqual(latest.read_text(), str(10**9 + day * 86400))
            CacheFiles(self.directory).write(
                "http://old", {"x": CacheEntry("http://old", 1, 1, None)}
            )
            old = Path(self.directory, directory_name("http://old"))
            self.find(self.serve("b"))
            self.assertTrue(old.exists())
        self.clock.advance(HOUSEKEEPING)
        self.find(self.serve("c"))
        self.assertFalse(old.exists())

    def test_long_ones(self) -> None:
        """U8: what takes long to be read is read in a thread, while others are answered."""
        item, other = self.serve("a"), self.serve("b")
        many = " ".join(path(letter).base for letter in "cdfgh") + " " * (64 << 10)
        url = f"{SERVER}/{item.hash_part}.narinfo"
        self.lookups.known[url] = Answer(200, text(item, many), None)
        held: list[Callable[[], None]] = []

        def threads(function: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
            done: Deferred[Any] = maybeDeferred(function, *arguments)
            if function.__name__ == "_read":
                done.pause()
                held.append(done.unpause)
            return done

        self.narinfos = self.make(threads)
        found = [Deferred.fromCoroutine(self.narinfos.find([p], [SERVER])) for p in (item, other)]
        self.assertNoResult(found[0])
        self.assertEqual(set(self.successResultOf(found[1])), {other})
        held[0]()
        self.assertEqual(len(self.successResultOf(found[0])[item].narinfo.references), 5)
        self.assertEqual(len(held), 1)

    def test_floods(self) -> None:
        """U8: long answers that come faster than they can be read are as good as none."""
        self.patch(narinfos, "MOST_WAITING", 100 << 10)
        items = [self.serve(letter) for letter in "abcdfgh"]
        for item in items:
            url = f"{SERVER}/{item.hash_part}.narinfo"
            self.lookups.known[url] = Answer(200, text(item, " " * (50 << 10)), None)
        held: list[Deferred[Any]] = []

        def threads(function: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
            done: Deferred[Any] = maybeDeferred(function, *arguments)
            if function.__name__ == "_read":
                done.pause()
                held.append(done)
            return done

        self.narinfos = self.make(threads)
        found = Deferred.fromCoroutine(self.narinfos.find(items, [SERVER]))
        self.assertEqual(len(held), 2)
        for done in held:
            done.unpause()
        self.assertEqual(set(self.successResultOf(found)), set(items[:2]))
        self.narinfos._threads = maybeDeferred  # the rest was not remembered
        self.assertEqual(set(self.find(*items)), set(items))

    def test_no_place(self) -> None:
        """U13, U18: where nothing can be used is nothing to be had; other servers are asked."""
        item, other = path("a"), "http://127.0.0.2"
        good = text(item).decode()
        more = good.replace("NarSize: 120", "NarSize: 121")
        forged = good.replace("host;good", "host;forged")
        for useless in ("", "URL: x\nCompression: rar\n", "URL: ftp://a/x\n", "URL: http://[\n"):
            vouched = good.replace("URL: nar/x\n", useless)
            unsigned = vouched.replace("host;good", "host;forged")
            for first, second, server, size in (
                (vouched, "", "", 0),
                (vouched, more, other, 121),
                (vouched, forged, other, 120),
                (forged, vouched, SERVER, 120),
                (unsigned, vouched, "", 0),
            ):
                for name, said in ((SERVER, first), (other, second)):
                    url = f"{name}/{item.hash_part}.narinfo"
                    self.lookups.known[url] = Answer(200 if said else 404, said.encode(), 0)
                found = self.find(item, servers=(SERVER, other))
                got = [
                    (offer.sources[0].server, offer.narinfo.nar_size) for offer in found.values()
                ]
                self.assertEqual(got, [(server, size)] if server else [], (useless, first, second))

    def test_sizes(self) -> None:
        """U24: what cannot be used does not count for the size of the download."""
        item = self.serve("a")
        places = "URL: a\nCompression: rar\nFileSize: 1\nURL: b\nCompression: gzip\nFileSize: 5\n"
        url = f"{SERVER}/{item.hash_part}.narinfo"
        body = text(item).replace(b"URL: nar/x\n", places.encode())
        self.lookups.known[url] = Answer(200, body, None)
        self.assertEqual(self.find(item)[item].download_size, 5)

    def test_another_item(self) -> None:
        """U8: an answer about something else is none, and is not kept in a file."""
        item = path("a")
        url = f"{SERVER}/{item.hash_part}.narinfo"
        self.lookups.known[url] = Answer(200, text(path("b")), None)
        self.assertEqual(self.find(item), {})
        self.assertFalse(Path(self.directory, DIRECTORY, item.hash_part).exists())

    def test_asked_together(self) -> None:
        """Who asks the same meanwhile waits for the same answer, even if the first one leaves."""
        item = self.serve("a")
        self.lookups.holds = True
        first = Deferred.fromCoroutine(self.narinfos.find([item], [SERVER]))
        second = Deferred.fromCoroutine(self.narinfos.find([item], [SERVER]))
        self.assertEqual(len(self.lookups.asked), 1)
        first.addErrback(lambda _: None)
        first.cancel()
        self.lookups.held[0]()
        self.assertEqual(set(self.successResultOf(second)), {item})

    def test_nobody_there(self) -> None:
        """A server that cannot be reached is left alone for a while, and named."""
        item = path("a")
        down = Answer(0, b"connection refused", None, "connect")
        self.lookups.known[f"{SERVER}/{item.hash_part}.narinfo"] = down
        told: list[str] = []
        self.assertEqual(self.find(item, told=told.append), {})
        self.assertEqual(self.find(item, told=told.append), {})
        self.assertEqual(len(self.lookups.asked), 1)
        self.assertIn("connection refused", told[0])
        self.serve("a")
        self.clock.advance(DOWN + 1)
        self.assertEqual(set(self.find(item)), {item})

    def test_many(self) -> None:
        """Others have their turn meanwhile; nobody is named twice."""
        self.patch(narinfos, "AT_ONCE", 2)
        items, told = [self.serve(letter) for letter in "abcd"], list[str]()
        down = Answer(0, b"connection refused", None, "connect")
        for item in items:
            self.lookups.known[f"http://down/{item.hash_part}.narinfo"] = down
        finding = self.narinfos.find(items, ["http://down", SERVER], told.append)
        found = Deferred.fromCoroutine(finding)
        self.assertNoResult(found)
        self.clock.advance(0)
        self.assertEqual(set(self.successResultOf(found)), set(items))
        self.assertEqual(len(told), 1)

    def test_false_names(self) -> None:
        """What somebody calls a server wrongly does not keep others from it."""
        names = SERVER.replace("http", "foo"), SERVER.replace("http", "https"), SERVER[7:]
        for name, letter in zip(names, "abc", strict=True):
            item = self.serve(letter)
            url = f"{name}/{item.hash_part}.narinfo"
            self.lookups.known[url] = Answer(0, b"not supported", None, "url")
            self.assertEqual(self.find(item, servers=[name]), {})
            self.assertEqual(set(self.find(item)), {item}, name)

    def test_nobody_asks(self) -> None:
        """When the process that downloads dies again and again, clients are told so."""
        item = path("a")
        self.serve("a")
        self.lookups.broken = "the process that downloads has died"
        told: list[str] = []
        self.assertEqual(self.find(item, told=told.append), {})
        self.assertIn("has died", told[0])
        self.lookups.broken = ""
        self.clock.advance(DOWN + 1)
        self.assertEqual(set(self.find(item)), {item})
