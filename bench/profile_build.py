#!/usr/bin/env python3
"""Show where the time of one trivial build goes, for guixd and the stock daemon; as root.

    bench/profile_build.py [--builds 100] [--alone]

The phases are what a client sees, so that daemons compare; medians in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import Daemon, in_private_mounts, journaled, now
from bench.run import daemons
from bench.workloads import Builds
from tests.interop import guest

PHASES = (
    "register the derivation",
    "plan, get slot and user, make the container (to build-started)",
    "start the builder (to its first output)",
    "the builder itself (to its last output)",
    "end, check, hash, register (to build-succeeded)",
    "answer the client",
)


class Clock:
    """Notes when each mark is first seen in a client's log."""

    def __init__(self, *marks: bytes) -> None:
        self.times = dict.fromkeys(marks, 0.0)

    def __call__(self, chunk: bytes) -> None:
        moment = now()
        for mark, seen in self.times.items():
            if not seen and mark in chunk:
                self.times[mark] = moment


def phases(workload: Builds, daemon: Daemon, number: int) -> list[float]:
    """Return the milliseconds of each of PHASES for one build."""
    wanted = workload.shell(daemon, f"profile-{number}", "echo FIRST; echo > $out; echo LAST")
    clock = Clock(b"@ build-started", b"FIRST", b"LAST", b"@ build-succeeded")
    with daemon.connect(trace=True) as client:
        client.on_log = clock
        times = [now()]
        path = workload.register(client, wanted)
        times.append(now())
        client.build([path])
        end = now()
        assert client.is_valid(wanted.out)
    times += [*clock.times.values(), end]
    return [1000 * (after - before) for before, after in pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Phases of one trivial build.")
    parser.add_argument("--builds", type=int, default=100)
    parser.add_argument("--alone", action="store_true", help="leave the stock daemon out")
    options = parser.parse_args()
    options.against = []
    if os.geteuid() != 0:
        sys.exit("bench/profile_build.py needs root")
    in_private_mounts()
    guest.root()
    guest.BuildUsers.claim()
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with journaled(directory / "guixd/bench", 4) as place:
        workload = Builds(1, guest.root() / "bin/busybox")
        compared = daemons(options, place)
        try:
            for daemon in compared:
                daemon.start()
                workload.prepare(daemon)
            samples: dict[str, list[list[float]]] = {daemon.name: [] for daemon in compared}
            for number in range(options.builds):
                for daemon in compared[:: -1 if number % 2 else 1]:
                    samples[daemon.name].append(phases(workload, daemon, number))
            columns = [
                [statistics.median(each) for each in zip(*samples[daemon.name], strict=True)]
                for daemon in compared
            ]
        finally:
            for daemon in compared:
                daemon.stop()
    print(f"{'phase':65}" + "".join(f"{daemon.name:>14}" for daemon in compared))
    for phase, *values in zip([*PHASES], *columns, strict=True):
        print(f"{phase:65}" + "".join(f"{value:14.2f}" for value in values))
    print(f"{'in all':65}" + "".join(f"{sum(column):14.2f}" for column in columns))


if __name__ == "__main__":
    main()
