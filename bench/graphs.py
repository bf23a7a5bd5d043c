"""W8: requests for many derivations, most of them small or built already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from bench.harness import Daemon, now
from bench.items import Derivation
from bench.wire import Client
from bench.workloads import Built, Metric


class Graphs(Built):
    """W8: a chain, what is built already, and what is only registered or asked for."""

    METRICS: ClassVar = {
        "chain of 50": Metric("1/s", ratio=1),
        "request for 2,000 built derivations": Metric("ms", more=False, ratio=2),
        "registering 5,000 derivations": Metric("1/s", ratio=1.5),
        "outputs of 5,000 derivations": Metric("1/s", ratio=2),
        "chain of 50, processor time of a build": Metric("ms", more=False),
    }
    repetitions = 3

    def chain(self, daemon: Daemon, client: Client, name: str, length: int) -> list[Derivation]:
        """Register LENGTH derivations, each of which needs the one before."""
        chain: list[Derivation] = []
        tools = daemon.facts["tools"]
        for number in range(length):
            script = f"cat {chain[-1].out if chain else '/dev/null'} > $out"
            chain.append(
                Derivation(
                    daemon.store, f"{name}-{number}", f"{tools}/bin/sh", ["-c", script],
                    {"PATH": f"{tools}/bin"}, [tools], chain[-1:],
                )
            )  # fmt: skip
            self.register(client, chain[-1])
        return chain

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        length, many = self.count(50, 5), self.count(5000, 50)
        with daemon.connect() as client:
            chain = self.chain(daemon, client, f"chain-{repetition}", length)
            with daemon.measure() as usage:
                client.build([chain[-1].path])
            assert Path(chain[-1].out).exists()

            # All of one output would be one build: these share the chain as their input.
            built = self.built(daemon, client)
            began = now()
            client.build([each.path for each in built])
            again = 1000 * (now() - began)

            wanted = [
                self.shell(daemon, f"reg-{repetition}-{n}", f"echo {n} > $out") for n in range(many)
            ]
            began = now()
            for each in wanted:
                self.register(client, each)
            registered = many / (now() - began)
            began = now()
            for each in wanted:
                assert client.derivation_outputs(each.path) == [each.out]
            asked = many / (now() - began)
        figures = (
            length / usage.wall, again, registered, asked, 1000 * usage.cpu / length
        )  # fmt: skip
        return dict(zip(self.METRICS, figures, strict=True))

    def built(self, daemon: Daemon, client: Client) -> Sequence[Derivation]:
        """Return 2,000 derivations whose outputs are valid; made at the first call."""
        found: Sequence[Derivation] | None = daemon.facts.get("built")
        if found is None:
            found = [
                self.shell(daemon, f"built-{n}", f"echo {n} > $out")
                for n in range(self.count(2000, 20))
            ]
            client.set_options(jobs=8)
            client.build([self.register(client, each) for each in found])
            client.set_options()
            daemon.facts["built"] = found
        return found
