"""Collections, and how others fare meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

from bench import items
from bench.harness import Daemon, now
from bench.wire import Client
from bench.workloads.base import Metric, Workload, delete, texts

_fork = get_context("fork")
Times = list[tuple[float, float]]
"""Beginnings and ends of requests, in seconds of one clock."""


class Busy:
    """Clients, each in a process of its own, that ask again and again until told to stop."""

    def __init__(self, asks: list[Callable[[Client, int], object]], daemon: Daemon) -> None:
        self._stop = _fork.Event()
        self._started = _fork.Barrier(len(asks) + 1)
        self._running = []
        for ask in asks:
            ours, theirs = _fork.Pipe()
            process = _fork.Process(target=self._work, args=(ask, daemon, theirs))
            process.start()
            theirs.close()
            self._running.append((process, ours))

    def _work(self, ask: Callable[[Client, int], object], daemon: Daemon, answer: Any) -> None:
        times: Times = []
        with daemon.connect() as client:
            ask(client, -1)
            self._started.wait()
            while not self._stop.is_set():
                began = now()
                ask(client, len(times))
                times.append((began, now()))
                time.sleep(0.001)
        answer.send(times)

    def begin(self) -> None:
        """Wait until all are at work."""
        self._started.wait()

    def end(self) -> list[Times]:
        """Stop them and return when each of them asked what."""
        self._stop.set()
        # They block when a pipe is full, so that it is read before they are waited for.
        found = [pipe.recv() for _, pipe in self._running]
        for process, _ in self._running:
            process.join()
        return found


def milliseconds(times: Times, began: float, ended: float) -> list[float]:
    """Return how long the requests took that lie in a span of time, sorted."""
    return sorted(1000 * (b - a) for a, b in times if b > began and a < ended)


def quantile(values: list[float], part: float) -> float:
    return values[min(len(values) - 1, int(part * len(values)))] if values else 0.0


class Garbage(Workload):
    """W8: lists, collections, and collections while four clients work."""

    METRICS: ClassVar = {
        "list live, 5,000 live and 5,000 dead": Metric("ms", more=False, ratio=5),
        "list dead": Metric("ms", more=False, ratio=5),
        "collect 5,000": Metric("ms", more=False, ratio=2),
        "collect 5,000 while 4 clients work": Metric("ms", more=False, ratio=2),
        "longest add during it": Metric("ms", more=False, limit=50),
        "p99 of adds during it": Metric("ms", more=False),
        "p99 of path-info during it": Metric("ms", more=False, ratio=1),
        "longest request while 20,000 are collected": Metric("ms", more=False, limit=100),
    }
    repetitions = 3

    def prepare(self, daemon: Daemon) -> None:
        live = texts(daemon, self.count(4950, 49), "live")
        with daemon.connect() as client:
            tops = [client.add_text(f"top-{n}", b"top %d" % n, live[n::49]) for n in range(49)]
            top = client.add_text("top", b"top", tops)
            link = daemon.directory / "root"
            link.symlink_to(top)
            client.add_indirect_root(str(link))
        daemon.facts["live"] = [*live, *tops, top]

    def _under_load(self, daemon: Daemon, repetition: int, count: int) -> tuple[float, ...]:
        live = daemon.facts["live"]
        dead = texts(daemon, count, f"more-{repetition}-{count}")
        source = random.Random(repetition)

        def info(client: Client, _number: int) -> None:
            client.path_info(source.choice(live))

        def adding(who: int) -> Callable[[Client, int], object]:
            name = f"during-{repetition}-{count}-{who}"
            return lambda client, number: client.add_text(f"{name}-{number}", b"%d" % number)

        busy = Busy([info, info, adding(1), adding(2)], daemon)
        busy.begin()
        with daemon.connect() as client:
            began = now()
            deleted = client.collect(2)
            ended = now()
        times = busy.end()
        assert set(dead) <= set(deleted)
        assert not set(live) & set(deleted)
        asked = milliseconds(times[0] + times[1], began, ended)
        added = milliseconds(times[2] + times[3], began, ended)
        return (
            1000 * (ended - began), max(added), quantile(added, 0.99), quantile(asked, 0.99),
            max(asked),
        )  # fmt: skip

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        live, figures = set(daemon.facts["live"]), []
        dead = set(texts(daemon, self.count(5000, 50), f"dead-{repetition}"))
        time.sleep(0.3)  # until the stock daemon's process of that client has ended
        with daemon.connect() as client:
            for action in range(3):
                began = now()
                found = set(client.collect(action))
                figures.append(1000 * (now() - began))
                assert live <= found if action == 0 else dead <= found and not live & found
            assert not client.valid_paths(list(dead))
            assert not any(Path(path).exists() for path in dead)
        time.sleep(0.3)
        loaded = self._under_load(daemon, repetition, self.count(5000, 50))
        figures += loaded[:4]
        many = self._under_load(daemon, repetition, self.count(20000, 100))
        figures.append(max(many[1], many[4]))
        with daemon.connect() as client:
            assert len(client.valid_paths(list(live))) == len(live)
        return dict(zip(self.METRICS, figures, strict=True))


class Latency(Workload):
    """W9: what others notice of a big addition."""

    METRICS: ClassVar = {
        "p50 of is-valid during a 512 MiB add": Metric("ms", more=False),
        "p99 of is-valid during it": Metric("ms", more=False, ratio=1),
        "longest is-valid during it": Metric("ms", more=False),
        "longest connect during it": Metric("ms", more=False),
    }
    repetitions = 3

    def prepare(self, daemon: Daemon) -> None:
        daemon.facts["paths"] = texts(daemon, 200, "item")

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        paths, source = daemon.facts["paths"], random.Random(repetition)

        def is_valid(client: Client, _number: int) -> None:
            assert client.is_valid(source.choice(paths))

        def connect(_client: Client, _number: int) -> None:
            daemon.connect().close()

        busy = Busy([is_valid, connect], daemon)
        busy.begin()
        chunks = list(items.big_file(self.count(512, 8), repetition))
        with daemon.connect() as client:
            began = now()
            path = client.add("file", chunks)
            ended = now()
        asked, connected = (milliseconds(each, began, ended) for each in busy.end())
        delete(daemon, [path])
        figures = (quantile(asked, 0.5), quantile(asked, 0.99), max(asked), max(connected))
        return dict(zip(self.METRICS, figures, strict=True))
