#!/usr/bin/env python3
"""Measure guixd side by side with the stock guix-daemon of the tests' guest; as root.

    bench/run.py [--only W1,W6] [--scale 0.2] [--against NAME=COMMAND]...

Each workload gets a fresh store, on a fresh ext4 with a journal, and runs several times
in the order A B, B A, so that what else the machine does hits both.  Printed, and
written to bench/results.md, are medians, ranges and ratios to the first daemon.  The
stock daemon's own figures vary by some 10 % (small texts, builds: up to 30 %) between
two runs of the same, so smaller differences say nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import Daemon, in_private_mounts, journaled, machine
from bench.workloads import ALL, Metric, Workload
from tests.interop import guest

# Build users must be able to reach it.
_CACHE = Path("/var/tmp/guixd-bench")
_Values = dict[str, dict[str, list[float]]]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure guixd beside the stock guix-daemon.")
    parser.add_argument("--only", default=",".join(ALL), help="workloads, such as W1,W6")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply all sizes")
    parser.add_argument("--repetitions", type=int, help="of each workload")
    parser.add_argument("--directory", type=Path, default=_CACHE, help="where the stores lie")
    parser.add_argument("--size", type=int, default=16, help="of the file system, in GiB")
    parser.add_argument("--alone", action="store_true", help="leave the stock daemon out")
    parser.add_argument("--against", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.md"))
    return parser.parse_args()


def daemons(options: argparse.Namespace, place: Path) -> list[Daemon]:
    """Return the daemons to compare, the stock one first."""
    found = []
    if not options.alone:
        directory = place / "stock"
        binds = {str(directory): str(directory), **guest.with_own_users(place)}
        view = partial(guest.view, guest.root(), binds)
        group = "--build-users-group=guixbuild"
        found.append(Daemon("guix-daemon", "guix-daemon --no-offload", group, directory, view))
    others = dict(each.split("=", 1) for each in options.against)
    for name, command in {"guixd": f"{sys.executable} -m guixd --no-offload", **others}.items():
        found.append(Daemon(name, command, f"--build-uids={guest.BUILD_UIDS}", place / name, list))
    return found


def measure(workload: Workload, compared: list[Daemon], repetitions: int) -> _Values:
    """Run WORKLOAD on all daemons in turn; return the figures by metric and daemon."""
    values: _Values = {metric: {} for metric in workload.METRICS}
    broken = set()

    def attempt(daemon: Daemon, repetition: int | None) -> None:
        if daemon.name in broken:
            return
        try:
            if repetition is None:
                daemon.options = workload.options
                daemon.facts.clear()
                daemon.start()
                workload.prepare(daemon)
            else:
                for metric, value in workload.run(daemon, repetition).items():
                    values[metric].setdefault(daemon.name, []).append(value)
        except Exception:  # noqa: BLE001 - the other daemons go on
            broken.add(daemon.name)
            print(f"{type(workload).__name__} failed on {daemon.name}:", file=sys.stderr)
            traceback.print_exc()

    try:
        for daemon in compared:
            attempt(daemon, None)
        for repetition in range(repetitions):
            for daemon in compared[:: -1 if repetition % 2 else 1]:
                attempt(daemon, repetition)
    finally:
        for daemon in compared:
            daemon.stop()
            workload.finish(daemon)
    return values


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def verdict(metric: Metric, ratio: float | None, value: float) -> str:
    """Return what was wanted of a figure, and whether it is reached."""
    if metric.limit is not None:
        return f"≤ {number(metric.limit)}: {'yes' if value <= metric.limit else 'NO'}"
    if metric.ratio is not None and ratio is not None:
        return f"≥ {metric.ratio}x: {'yes' if ratio >= metric.ratio else 'NO'}"
    return ""


def rows(key: str, workload: Workload, values: _Values, names: list[str]) -> list[str]:
    """Return the table's rows of one workload."""
    lines = []
    for label, metric in workload.METRICS.items():
        cells = [f"{key} {label}", metric.unit]
        medians = {name: statistics.median(each) for name, each in values[label].items()}
        for name in names:
            each = values[label].get(name)
            if not each:
                cells += ["failed"] + [""] * 2 * (name != names[0])
                continue
            cells.append(f"{number(medians[name])} ({number(min(each))}-{number(max(each))})")
            if name != names[0] or len(names) == 1:
                ratio = None
                if names[0] in medians and len(names) > 1 and medians[name] > 0:
                    ratio = medians[name] / medians[names[0]]
                    ratio = ratio if metric.more else 1 / ratio
                cells += [
                    f"{ratio:.2f}x" if ratio else "",
                    verdict(metric, ratio, medians[name]),
                ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    options = arguments()
    if os.geteuid() != 0:
        sys.exit("bench/run.py needs root: for build users, and for a file system of its own")
    in_private_mounts()
    guest.root()
    guest.BuildUsers.claim()
    with journaled(options.directory, options.size) as place:
        facts = machine(place)
        compared = daemons(options, place)
        names = [daemon.name for daemon in compared]
        busybox = guest.root() / "bin/busybox"
        head = ["metric", "unit", names[0]]
        for name in names[1:] or [""]:
            head += [name, "ratio", "wanted"] if name else ["ratio", "wanted"]
        table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        print("\n".join(table), flush=True)
        for key in options.only.split(","):
            workload = ALL[key](options.scale, busybox)
            values = measure(workload, compared, options.repetitions or workload.repetitions)
            lines = rows(key, workload, values, names)
            print("\n".join(lines), flush=True)
            table += lines
    facts["load after"] = str([round(value, 2) for value in os.getloadavg()])
    facts["scale"] = str(options.scale)
    text = ["# Results of bench/run.py", "", *(f"* {k}: {v}" for k, v in facts.items()), ""]
    text += ["Medians (least-most); a ratio above 1 is better than the first daemon.", "", *table]
    options.results.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
