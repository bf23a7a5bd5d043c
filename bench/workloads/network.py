"""Downloads of sources."""

from __future__ import annotations

import os
import random
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from bench.harness import Daemon
from bench.items import MIB, Derivation
from bench.server import Server, fresh
from bench.workloads.base import Metric, Workload, delete, timed


class Downloads(Workload):
    """W12: `builtin:download`."""

    METRICS: ClassVar = {
        "download 256 MiB": Metric("MiB/s", ratio=2),
        "download a small file": Metric("ms", more=False, ratio=10),
        "download 10 small files, 2 jobs": Metric("ms", more=False, ratio=10),
    }
    options = ("--no-substitutes",)
    repetitions = 3

    def prepare(self, daemon: Daemon) -> None:
        files = fresh(daemon.directory / "files")
        block, size = random.Random(5).randbytes(MIB), self.count(256, 4)
        digest = sha256()
        with (files / "big").open("wb") as file:
            for _ in range(size):
                file.write(block)
                digest.update(block)
        daemon.facts.update(files=files, big=digest.hexdigest(), size=size, server=Server(files))

    def finish(self, daemon: Daemon) -> None:
        server = daemon.facts.pop("server", None)
        if server is not None:
            server.stop()

    @staticmethod
    def _download(daemon: Daemon, file: str, name: str, digest: str) -> Derivation:
        variables = {"url": f'"{daemon.facts["server"].url}/{file}"', "preferLocalBuild": "1"}
        return Derivation(
            daemon.store, name, "builtin:download", [], variables, [], sha256_of_file=digest
        )

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        files: Path = daemon.facts["files"]
        small = []
        for n in range(11):
            name, text = f"small-{repetition}-{n}", b"small %d %d" % (repetition, n)
            (files / name).write_bytes(text)
            small.append(self._download(daemon, name, name, sha256(text).hexdigest()))
        big = self._download(daemon, "big", f"big-{repetition}", daemon.facts["big"])
        times = []
        for group in [big], small[:1], small[1:]:
            with daemon.connect(2) as client:
                for each in group:
                    client.add_text(each.name + ".drv", each.text, each.references)
                paths = [each.path for each in group]
                times.append(timed(lambda client=client, paths=paths: client.build(paths)))  # type: ignore[misc]
                assert len(client.valid_paths([each.out for each in group])) == len(group)
        assert os.path.getsize(big.out) == daemon.facts["size"] * MIB
        assert Path(small[-1].out).read_bytes() == text
        delete(daemon, [big.path])
        delete(daemon, [big.out])
        figures = (1000 * daemon.facts["size"] / times[0], times[1], times[2])
        return dict(zip(self.METRICS, figures, strict=True))
