"""Builds and their logs."""

from __future__ import annotations

import gzip
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from bench import items
from bench.harness import Daemon, now
from bench.items import MIB, Derivation
from bench.wire import Client
from bench.workloads.base import Metric, Workload


class Built(Workload):
    """Base of what builds: busybox as a source, and derivations of shell scripts."""

    options: Sequence[str] = ("--no-substitutes",)

    def prepare(self, daemon: Daemon) -> None:
        tools = {"busybox": items.nar_file(self.busybox.read_bytes(), executable=True)}
        for tool in "sh", "cat", "sleep", "echo":
            tools[tool] = items.nar_link("busybox")
        archive = items.nar(items.nar_directory({"bin": items.nar_directory(tools)}))
        with daemon.connect() as client:
            daemon.facts["tools"] = client.add("tools", [archive])

    def shell(
        self,
        daemon: Daemon,
        name: str,
        script: str,
        *sources: str,
        inputs: Sequence[Derivation] = (),
    ) -> Derivation:
        bin_ = daemon.facts["tools"] + "/bin"
        sources = (daemon.facts["tools"], *sources)
        arguments = ["-c", script]
        return Derivation(
            daemon.store, name, bin_ + "/sh", arguments, {"PATH": bin_}, sources, inputs
        )

    @staticmethod
    def register(client: Client, derivation: Derivation) -> str:
        """Register DERIVATION and return its path."""
        path = client.add_text(derivation.name + ".drv", derivation.text, derivation.references)
        assert path == derivation.path
        return path


class Builds(Built):
    """W6: small builds in containers, as build users."""

    METRICS: ClassVar = {
        "builds, 1 job": Metric("1/s", ratio=1.2),
        "builds, 2 jobs": Metric("1/s"),
        "builds, 8 jobs": Metric("1/s", ratio=1.5),
        "one build": Metric("ms", more=False, ratio=1),
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
            self._many(daemon, repetition, 2),
            self._many(daemon, repetition, 8),
            self._one(daemon, repetition),
            self._shared(daemon, repetition),
        )
        return dict(zip(self.METRICS, figures, strict=True))


class PlainBuilds(Builds):
    """W6: the same without containers."""

    METRICS: ClassVar = {
        "builds without container, 1 job": Metric("1/s", ratio=1),
        "builds without container, 2 jobs": Metric("1/s", ratio=1),
        "builds without container, 8 jobs": Metric("1/s", ratio=1),
        "one build without container": Metric("ms", more=False, ratio=1),
    }
    options: Sequence[str] = ("--no-substitutes", "--disable-chroot")

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        figures = [self._many(daemon, repetition, jobs) for jobs in (1, 2, 8)]
        figures.append(self._one(daemon, repetition))
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
