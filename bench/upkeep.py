"""W10: looking after the whole store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from bench import items
from bench.harness import Daemon
from bench.workloads import Metric, Workload


class Upkeep(Workload):
    """W10: verifying and optimising, where nothing was shared before."""

    METRICS: ClassVar = {
        "verify 1 GiB with contents": Metric("MiB/s", ratio=1.8),
        "verify 5,000 paths": Metric("ms", more=False),
        "optimise a 20,000-file tree": Metric("files/s", ratio=1),
    }
    options: Sequence[str] = ("--disable-chroot", "--disable-deduplication")
    repetitions = 3

    def prepare(self, daemon: Daemon) -> None:
        size = self.count(512, 16)
        with daemon.connect() as client:
            for number in range(2):
                client.add(f"big-{number}", items.big_file(size, number))
            for number in range(self.count(5000, 50)):
                client.add_text(f"small-{number}", b"%d" % number)
            client.optimise()

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        files = self.count(20000, 400)
        with daemon.connect() as client:
            with daemon.measure() as thorough:
                assert not client.verify(contents=True)
            with daemon.measure() as quick:
                assert not client.verify(contents=False)
            tree = client.add("tree", [items.tree(files, repetition)])
            with daemon.measure() as sharing:
                client.optimise()
        twins = [Path(tree, f"dir-{n // 200:03}", f"file-{n:05}").stat() for n in (19, 339)]
        assert twins[0].st_ino == twins[1].st_ino
        assert Path(tree, "dir-000").stat().st_mtime == 1
        size = 2 * self.count(512, 16)
        figures = size / thorough.wall, 1000 * quick.wall, files / sharing.wall
        return dict(zip(self.METRICS, figures, strict=True))
