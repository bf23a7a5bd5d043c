"""Connections and questions."""

from __future__ import annotations

import random
import statistics
from typing import ClassVar

from bench import wire
from bench.harness import Daemon, now, together
from bench.items import MIB
from bench.workloads.base import Metric, Workload, rate, settled


class Connections(Workload):
    """W1: connecting, and being connected."""

    METRICS: ClassVar = {
        "connect, one client": Metric("1/s", ratio=5),
        "connect, 4 clients": Metric("1/s"),
        "memory per idle connection": Metric("KiB", more=False, limit=60),
        "memory with 64 connections": Metric("MiB", more=False),
    }

    def _cycles(self, daemon: Daemon, clients: int) -> float:
        each = self.count(400, 20) // clients

        def work(_: object) -> None:
            for _ in range(each):
                daemon.connect().close()

        wall, _ = together([(lambda: None, work)] * clients)
        return each * clients / wall

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        one, four = self._cycles(daemon, 1), self._cycles(daemon, 4)
        before = settled(daemon.memory)
        held = [daemon.connect() for _ in range(64)]
        with_all = settled(daemon.memory)
        assert not any(client.is_valid(f"{daemon.store}/{'0' * 32}-x") for client in held)
        for client in held:
            client.close()
        per_one = (with_all - before) / 64 / 1024
        return dict(zip(self.METRICS, (one, four, per_one, with_all / MIB), strict=True))


class Queries(Workload):
    """W2: questions about 10,000 valid items."""

    METRICS: ClassVar = {
        "is-valid, 1 client": Metric("1/s", ratio=0.8),
        "is-valid, 8 clients": Metric("1/s", ratio=0.8),
        "path-info, 1 client": Metric("1/s", ratio=0.8),
        "path-info, 8 clients": Metric("1/s", ratio=0.8),
        "valid among 5,000": Metric("ms", more=False, ratio=3),
    }

    def prepare(self, daemon: Daemon) -> None:
        known: dict[str, list[str]] = {}
        with daemon.connect() as client:
            for n in range(self.count(10000, 100)):
                references = list(known)[-3:] if n % 4 == 3 else []
                path = client.add_text(f"item-{n}", b"content %d" % n, references)
                known[path] = references
        daemon.facts["known"] = known

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        known: dict[str, list[str]] = daemon.facts["known"]
        paths = list(known)
        random.Random(repetition).shuffle(paths)
        figures = []
        valid = [wire.is_valid_request(path) for path in paths]
        info = [wire.path_info_request(path, known[path]) for path in paths]
        for requests, more in (valid, 2), (info, 1):
            for clients in 1, 8:
                per_second, replies = rate(daemon, requests * more, clients)
                figures.append(per_second)
                last = wire.word(wire.LAST)
                assert all(reply[:8] == last for share in replies for reply in share)
                if requests is valid:
                    assert all(reply == last + wire.word(1) for share in replies for reply in share)
        half = paths[: len(paths) // 2]
        batch = wire.valid_paths_request([*half, *(path + "x" for path in half[:50])], half)
        with daemon.connect() as client:
            times = []
            for _ in range(5):
                began = now()
                (reply,) = client.exchange([batch])
                times.append(1000 * (now() - began))
                assert reply == wire.word(wire.LAST) + wire.strings(sorted(half))
            for path in half[:20]:
                deriver, _, references, _ = client.path_info(path)
                assert (deriver, references) == ("", sorted(known[path]))
        figures.append(statistics.median(times))
        return dict(zip(self.METRICS, figures, strict=True))
