"""What is measured.  Every workload checks the answers that it gets.

A workload prepares each daemon once and then runs several times on each; a run returns
its figures by name.  `METRICS` has, for each name, the unit, whether more is better,
and the ratio to the stock daemon that is wanted (or an absolute bound).
"""

from __future__ import annotations

from bench.workloads.adding import Texts, Trees
from bench.workloads.archives import Archives
from bench.workloads.base import Metric, Workload
from bench.workloads.building import Builds, Logs, PlainBuilds
from bench.workloads.garbage import Garbage, Latency
from bench.workloads.graphs import Graph
from bench.workloads.network import Downloads
from bench.workloads.queries import Connections, Queries
from bench.workloads.substitutes import DistantSubstitutes, Substitutes
from bench.workloads.verifying import Verify

__all__ = ["ALL", "Metric", "Workload"]

ALL: dict[str, type[Workload]] = {
    "W1": Connections,
    "W2": Queries,
    "W3": Texts,
    "W4": Trees,
    "W5": Archives,
    "W6": Builds,
    "W6n": PlainBuilds,
    "W6g": Graph,
    "W7": Logs,
    "W8": Garbage,
    "W9": Latency,
    "W10": Verify,
    "W12d": Downloads,
    "W12s": Substitutes,
    "W12l": DistantSubstitutes,
}
