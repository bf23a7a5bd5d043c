"""Archives of store items: out and in."""

from __future__ import annotations

from hashlib import sha256
from typing import ClassVar

from bench import items
from bench.harness import Daemon, now
from bench.wire import Client, word
from bench.workloads.base import Metric, Workload, delete, texts, timed


class Archives(Workload):
    """W5: export and import."""

    METRICS: ClassVar = {
        "export 512 MiB": Metric("MiB/s", ratio=1.2),
        "export the tree": Metric("files/s", ratio=1),
        "export a small path, signed, first": Metric("ms", more=False, ratio=10),
        "export 100 small paths, signed": Metric("ms", more=False),
        "import 512 MiB": Metric("MiB/s", ratio=2.5),
        "import the tree": Metric("files/s", ratio=1.5),
        "import 100 small paths": Metric("ms", more=False, ratio=2),
    }
    repetitions = 3

    def prepare(self, daemon: Daemon) -> None:
        size, files = self.count(512, 8), self.count(20000, 400)
        large = []
        with daemon.connect() as client:
            for name, chunks, amount in (
                ("file", list(items.big_file(size, 1)), size),
                ("tree", [items.tree(files, 1)], files),
            ):
                digest = sha256(b"".join(chunks)).hexdigest()
                large.append((client.add(name, chunks), digest, amount))
        daemon.facts["large"] = large
        daemon.facts["small"] = texts(daemon, self.count(100, 10), "small")

    @staticmethod
    def _signed(client: Client, paths: list[str]) -> bytes:
        out = bytearray()
        for path in paths:
            out += word(1)
            client.export(path, out.extend, sign=True)
        return bytes(out + word(0))

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        large, small = daemon.facts["large"], daemon.facts["small"]
        figures, archives = [], []
        for path, digest, amount in large:
            pieces: list[bytes] = []
            with daemon.connect() as client:
                began = now()
                client.export(path, pieces.append)
                figures.append(amount / (now() - began))
                size = client.path_info(path)[3]
            assert sha256(b"".join(pieces)[:size]).hexdigest() == digest
        del pieces
        with daemon.connect() as client:
            figures.append(timed(lambda: self._signed(client, small[:1])))
            began = now()
            archive = self._signed(client, small)
            figures.append(1000 * (now() - began))
            archives = [self._signed(client, [path]) for path, _, _ in large]
        delete(daemon, [path for path, _, _ in large] + small)
        for (path, digest, amount), data in zip(large, archives, strict=True):
            with daemon.connect() as client:
                began = now()
                assert client.import_paths(data) == [path]
                figures.append(amount / (now() - began))
                assert client.path_info(path)[1] == digest
        with daemon.connect() as client:
            began = now()
            assert client.import_paths(archive) == small
            figures.append(1000 * (now() - began))
        return dict(zip(self.METRICS, figures, strict=True))
