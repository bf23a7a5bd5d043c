"""Verification, and files that are stored once."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from bench import items
from bench.harness import Daemon, now
from bench.workloads.base import Metric, Workload, delete, texts, timed


class Verify(Workload):
    """W10: verify and optimise."""

    METRICS: ClassVar = {
        "verify the contents of 1 GiB": Metric("MiB/s", ratio=1.8),
        "verify without contents, 5,000 paths": Metric("ms", more=False),
        "optimise the tree": Metric("files/s", ratio=1),
    }
    options = (*Workload.options, "--disable-deduplication")
    repetitions = 3

    def prepare(self, daemon: Daemon) -> None:
        size = self.count(512, 8)
        with daemon.connect() as client:
            for number in range(2):
                client.add(f"file-{number}", items.big_file(size, number))
        daemon.facts["size"] = 2 * size
        texts(daemon, self.count(5000, 50), "small")
        with daemon.connect() as client:
            client.optimise()  # so that a run has to do with the tree only

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        files = self.count(20000, 800)
        with daemon.connect() as client:
            began = now()
            assert client.verify(contents=True)
            verified = daemon.facts["size"] / (now() - began)
            light = timed(lambda: client.verify(contents=False))
            path = client.add("tree", [items.tree(files, repetition)])
            twins = [Path(path, "dir-000/file-00019"), Path(path, "dir-001/file-00339")]
            assert twins[0].read_bytes() == twins[1].read_bytes()
            assert twins[0].stat().st_ino != twins[1].stat().st_ino
            began = now()
            client.optimise()
            optimised = files / (now() - began)
            assert twins[0].stat().st_ino == twins[1].stat().st_ino
            assert Path(path, "dir-000").stat().st_mtime == 1
        delete(daemon, [path])
        return dict(zip(self.METRICS, (verified, light, optimised), strict=True))
