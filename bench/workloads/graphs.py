"""Many derivations at a time."""

from __future__ import annotations

import random
import statistics
from typing import ClassVar

from bench import wire
from bench.harness import Daemon, now
from bench.workloads.base import Metric, rate, timed
from bench.workloads.building import Built


class Graph(Built):
    """W6: derivations that build on each other, in large numbers."""

    METRICS: ClassVar = {
        "register 5,000 derivations": Metric("1/s", ratio=1.5),
        "outputs of 5,000 derivations": Metric("1/s", ratio=2),
        "valid among their outputs": Metric("ms", more=False, ratio=2),
        "request for 2,000 built derivations": Metric("ms", more=False, ratio=2),
        "chain of 50 builds": Metric("ms", more=False, ratio=1),
        "wide graph of 100 builds, 8 jobs": Metric("1/s"),
    }
    repetitions = 3

    def prepare(self, daemon: Daemon) -> None:
        super().prepare(daemon)
        built = [
            self.shell(daemon, f"built-{n}", f"echo {n} > $out")
            for n in range(self.count(2000, 20))
        ]
        with daemon.connect(8) as client:
            for each in built:
                self.register(client, each)
            client.build([each.path for each in built])
        daemon.facts["built"] = [each.path for each in built]

    def _layers(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        source = random.Random(repetition)
        layers, count = [], self.count(5000, 100)
        while sum(map(len, layers)) < count:
            below = layers[-1] if layers else []
            layers.append(
                [
                    self.shell(
                        daemon, f"node-{repetition}-{len(layers)}-{n}", "echo > $out",
                        inputs=source.sample(below, min(3, len(below))),
                    )
                    for n in range(50)
                ]
            )  # fmt: skip
        graph = [each for layer in layers for each in layer]
        outs = [each.out for each in graph]
        with daemon.connect() as client:
            began = now()
            for each in graph:
                self.register(client, each)
            registered = len(graph) / (now() - began)
            batch = statistics.median(timed(lambda: client.valid_paths(outs)) for _ in range(3))
            assert client.valid_paths(outs) == []
        requests = [wire.outputs_request(each.path, [each.out]) for each in graph]
        per_second, replies = rate(daemon, requests, 1)
        last = wire.word(wire.LAST)
        expected = [last + wire.strings([out]) for out in outs]
        assert replies[0] == expected
        return dict(zip(self.METRICS, (registered, per_second, batch), strict=False))

    def _chain(self, daemon: Daemon, repetition: int) -> float:
        chain = [self.shell(daemon, f"chain-{repetition}-0", "echo > $out")]
        for n in range(1, self.count(50, 4)):
            script = f"cat {chain[-1].out} > $out; echo {chain[-1].out} >> $out"
            name = f"chain-{repetition}-{n}"
            chain.append(self.shell(daemon, name, script, inputs=chain[-1:]))
        with daemon.connect(2) as client:
            for each in chain:
                self.register(client, each)
            wall = timed(lambda: client.build([chain[-1].path]))
            assert chain[-2].out in client.path_info(chain[-1].out)[2]
        return wall

    def _wide(self, daemon: Daemon, repetition: int) -> float:
        count = self.count(100, 10)
        leaves = [
            self.shell(daemon, f"leaf-{repetition}-{n}", f"echo {n} > $out") for n in range(count)
        ]
        script = f"cat {' '.join(each.out for each in leaves)} > $out"
        top = self.shell(daemon, f"top-{repetition}", script, inputs=leaves)
        with daemon.connect(8) as client:
            for each in [*leaves, top]:
                self.register(client, each)
            wall = timed(lambda: client.build([top.path]))
            assert client.is_valid(top.out)
        return 1000 * (count + 1) / wall

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        figures = list(self._layers(daemon, repetition).values())
        with daemon.connect() as client:
            figures.append(timed(lambda: client.build(daemon.facts["built"])))
        figures += [self._chain(daemon, repetition), self._wide(daemon, repetition)]
        return dict(zip(self.METRICS, figures, strict=True))
