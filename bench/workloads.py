"""What is measured.  Every workload checks the answers that it gets.

A workload prepares each daemon once and then runs several times on each; a run returns
its figures by name.  `METRICS` has, for each name, the unit, whether more is better,
and the ratio to the stock daemon that is wanted (or, with `LIMITS`, an absolute bound).
"""

from __future__ import annotations

import gzip
import random
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from bench import items, wire
from bench.harness import Daemon, now, together
from bench.items import MIB, Derivation
from bench.wire import Client


@dataclass(frozen=True)
class Metric:
    """A figure: its unit, whether MORE is better, and what is wanted of it."""

    unit: str
    more: bool = True
    ratio: float | None = None
    """Wanted speed in units of the stock daemon's, above 1 is faster."""
    limit: float | None = None
    """Bound of the figure itself."""


class Workload:
    """Base of the workloads; `scale` multiplies their sizes."""

    METRICS: ClassVar[dict[str, Metric]] = {}
    options: Sequence[str] = ("--disable-chroot",)
    repetitions = 5

    def __init__(self, scale: float, busybox: Path) -> None:
        self.scale, self.busybox = scale, busybox

    def count(self, full: int, least: int = 1) -> int:
        """Return FULL, scaled."""
        return max(least, round(full * self.scale))

    def prepare(self, daemon: Daemon) -> None:
        """Fill the store as the runs need it."""

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        raise NotImplementedError


def greeted(daemon: Daemon) -> Callable[[], Client]:
    return daemon.connect


def exchanging(requests: list[tuple[bytes, int]]) -> Callable[[Client], list[bytes]]:
    return lambda client: client.exchange(requests)


def rate(daemon: Daemon, requests: list[tuple[bytes, int]], clients: int) -> tuple[float, Any]:
    """Share REQUESTS among CLIENTS; return requests per second and all replies."""
    shares = [requests[n::clients] for n in range(clients)]
    wall, replies = together([(greeted(daemon), exchanging(share)) for share in shares])
    return len(requests) / wall, replies


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


def settled(measure: Callable[[], int]) -> int:
    """Return a figure once two looks at it agree within 1 %."""
    last = measure()
    for _ in range(20):
        this = measure()
        if abs(this - last) <= last / 100:
            return this
        last = this
    return last


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


class Built(Workload):
    """Base of what builds: busybox as a source, and derivations of shell scripts."""

    options: Sequence[str] = ()

    def prepare(self, daemon: Daemon) -> None:
        tools = {"busybox": items.nar_file(self.busybox.read_bytes(), executable=True)}
        for tool in "sh", "cat", "sleep", "echo":
            tools[tool] = items.nar_link("busybox")
        archive = items.nar(items.nar_directory({"bin": items.nar_directory(tools)}))
        with daemon.connect() as client:
            daemon.facts["tools"] = client.add("tools", [archive])

    def shell(self, daemon: Daemon, name: str, script: str, *sources: str) -> Derivation:
        bin_ = daemon.facts["tools"] + "/bin"
        sources = (daemon.facts["tools"], *sources)
        return Derivation(daemon.store, name, bin_ + "/sh", ["-c", script], {"PATH": bin_}, sources)

    @staticmethod
    def register(client: Client, derivation: Derivation) -> str:
        """Register DERIVATION and return its path."""
        path = client.add_text(derivation.name + ".drv", derivation.text, derivation.references)
        assert path == derivation.path
        return path


class Builds(Built):
    """W6: small builds in containers, as build users."""

    METRICS: ClassVar = {
        "builds, 1 job": Metric("1/s", ratio=1),
        "builds, 8 jobs": Metric("1/s", ratio=1.3),
        "one build": Metric("ms", more=False),
        "second client of a 0.3 s build, later than the first by": Metric(
            "ms", more=False, limit=20
        ),
    }

    def _many(self, daemon: Daemon, repetition: int, jobs: int) -> float:
        wanted = [
            self.shell(daemon, f"many-{repetition}-{jobs}-{n}", f"echo {n} > $out")
            for n in range(self.count(100, 10))
        ]
        with daemon.connect(jobs) as client:
            paths = [self.register(client, each) for each in wanted]
            began = now()
            client.build(paths)
            wall = now() - began
            assert set(client.valid_paths([each.out for each in wanted])) == {
                each.out for each in wanted
            }
            deriver, _, _, _ = client.path_info(wanted[-1].out)
            assert deriver == wanted[-1].path
        assert Path(wanted[-1].out).read_text() == f"{len(wanted) - 1}\n"
        return len(wanted) / wall

    def _one(self, daemon: Daemon, repetition: int) -> float:
        times = []
        with daemon.connect() as client:
            for n in range(10):
                one = self.shell(daemon, f"one-{repetition}-{n}", "echo x > $out")
                path = self.register(client, one)
                began = now()
                client.build([path])
                times.append(1000 * (now() - began))
                assert Path(one.out).read_text() == "x\n"
        return statistics.median(times)

    def _shared(self, daemon: Daemon, repetition: int) -> float:
        shared = self.shell(daemon, f"shared-{repetition}", "echo begun; sleep 0.3; echo > $out")
        begun = threading.Event()
        ends = {}

        def want(who: str, client: Client) -> None:
            client.build([shared.path])
            ends[who] = now()

        with daemon.connect() as first, daemon.connect() as second:
            self.register(first, shared)
            first.on_log = lambda _: begun.set()
            threads = [
                threading.Thread(target=want, args=pair)
                for pair in (("first", first), ("second", second))
            ]
            threads[0].start()
            assert begun.wait(20)
            threads[1].start()
            for thread in threads:
                thread.join()
        return 1000 * (ends["second"] - ends["first"])

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        figures = (
            self._many(daemon, repetition, 1),
            self._many(daemon, repetition, 8),
            self._one(daemon, repetition),
            self._shared(daemon, repetition),
        )
        return dict(zip(self.METRICS, figures, strict=True))


class Logs(Built):
    """W7: what a builder writes reaches the client and the log file."""

    METRICS: ClassVar = {"log of ordinary lines": Metric("MB/s", ratio=2)}
    repetitions = 3

    def prepare(self, daemon: Daemon) -> None:
        super().prepare(daemon)
        lines = items.log_lines(self.count(10**7, 10**6))
        with daemon.connect() as client:
            archive = items.nar(items.nar_file(lines))
            daemon.facts["lines"] = client.add("lines", [archive])
        daemon.facts["size"] = len(lines)

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        lines = daemon.facts["lines"]
        again = 10
        wanted = self.shell(
            daemon, f"log-{repetition}", f"cat {' '.join([lines] * again)}; echo > $out", lines
        )
        received = 0

        def count(chunk: bytes) -> None:
            nonlocal received
            received += len(chunk)

        with daemon.connect() as client:
            path = self.register(client, wanted)
            client.on_log = count
            began = now()
            client.build([path])
            wall = now() - began
        size = again * daemon.facts["size"]
        assert size <= received < size + 10**5, (size, received)
        name = Path(path).name
        with gzip.open(daemon.directory / "log/drvs" / name[:2] / (name[2:] + ".gz")) as log:
            assert sum(map(len, iter(lambda: log.read(MIB), b""))) == size
        return {"log of ordinary lines": size / wall / 1e6}


ALL: dict[str, type[Workload]] = {
    "W1": Connections,
    "W2": Queries,
    "W3": Texts,
    "W4": Trees,
    "W6": Builds,
    "W7": Logs,
}
