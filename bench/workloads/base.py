"""What workloads have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench.harness import Daemon, now, together
from bench.wire import Client, Refused


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
    options: Sequence[str] = ("--disable-chroot", "--no-substitutes")
    repetitions = 5

    def __init__(self, scale: float, busybox: Path) -> None:
        self.scale, self.busybox = scale, busybox

    def count(self, full: int, least: int = 1) -> int:
        """Return FULL, scaled."""
        return max(least, round(full * self.scale))

    def prepare(self, daemon: Daemon) -> None:
        """Fill the store as the runs need it."""

    def finish(self, daemon: Daemon) -> None:
        """Give back what `prepare` took, even if that failed."""

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


def settled(measure: Callable[[], int]) -> int:
    """Return a figure once two looks at it agree within 1 %."""
    last = measure()
    for _ in range(20):
        this = measure()
        if abs(this - last) <= last / 100:
            return this
        last = this
    return last


def delete(daemon: Daemon, paths: Sequence[str]) -> None:
    """Delete PATHS, which nothing may use any more, and see that they are gone.

    The stock daemon's process of a client that has left may protect them for a moment more.
    """
    for _ in range(50):
        with daemon.connect() as client:
            try:
                client.collect(3, paths)
                break
            except Refused:
                time.sleep(0.1)
    with daemon.connect() as client:
        assert not client.valid_paths(list(paths))


def texts(daemon: Daemon, count: int, prefix: str) -> list[str]:
    """Add COUNT small texts named after PREFIX; return their paths."""
    with daemon.connect() as client:
        return [
            client.add_text(f"{prefix}-{n}", b"%d of %s" % (n, prefix.encode()))
            for n in range(count)
        ]


def timed(work: Callable[[], object]) -> float:
    """Return the milliseconds that WORK takes."""
    began = now()
    work()
    return 1000 * (now() - began)
