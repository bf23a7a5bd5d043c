"""What clients add."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from bench import items, wire
from bench.harness import Daemon
from bench.items import MIB
from bench.workloads.base import Metric, Workload, rate


class Texts(Workload):
    """W3: small texts that are new."""

    METRICS: ClassVar = {
        "new texts, 1 client": Metric("1/s", ratio=1),
        "new texts, 4 clients": Metric("1/s", ratio=1.5),
    }

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        figures = []
        for clients in 1, 4:
            texts = {
                f"text-{repetition}-{clients}-{n}": b"text %d of %d\n" % (n, repetition)
                for n in range(self.count(4000, 100))
            }
            requests = [wire.add_text_request(*each, daemon.store) for each in texts.items()]
            per_second, _ = rate(daemon, requests, clients)
            figures.append(per_second)
            with daemon.connect() as client:
                for name, text in list(texts.items())[:: len(texts) // 20]:
                    path = items.text_path(daemon.store, name, text)
                    assert client.is_valid(path)
                    assert Path(path).read_bytes() == text
        return dict(zip(self.METRICS, figures, strict=True))


class Trees(Workload):
    """W4: a large file, and a tree of small ones."""

    METRICS: ClassVar = {
        "512 MiB file": Metric("MiB/s", ratio=2),
        "peak memory meanwhile": Metric("MiB", more=False, limit=100),
        "20,000-file tree": Metric("files/s", ratio=1),
        "peak memory with the tree": Metric("MiB", more=False),
    }
    repetitions = 3

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        size, files = self.count(512, 16), self.count(20000, 400)
        figures = []
        for name, chunks, amount in (
            ("file", list(items.big_file(size, repetition)), size),
            ("tree", [items.tree(files, repetition)], files),
        ):
            digest = sha256()
            for chunk in chunks:
                digest.update(chunk)
            with daemon.connect() as client:
                with daemon.measure(memory=True) as usage:
                    path = client.add(name, chunks)
                figures += [amount / usage.wall, usage.peak / MIB]
                expected = items.store_path(daemon.store, "source", digest.hexdigest(), name)
                assert path == expected
                assert client.path_info(path)[1] == digest.hexdigest()
            if name == "file":
                assert Path(path).stat().st_size == size * MIB
            else:
                assert sum(1 for each in Path(path).rglob("*") if each.is_file()) == files
        return dict(zip(self.METRICS, figures, strict=True))
