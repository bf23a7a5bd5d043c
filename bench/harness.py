"""Daemons under test, what their processes use, and clients in processes of their own."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from bench import items
from bench.wire import Client

now = time.perf_counter
_fork = multiprocessing.get_context("fork")
_TICKS = os.sysconf("SC_CLK_TCK")


def tree_of(root: int) -> dict[int, float]:
    """Return the processes below and including ROOT, with the CPU seconds of each.

    Those of children that were waited for count for their parents.
    """
    children: dict[int, list[int]] = {}
    seconds = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
                seconds[int(entry)] = sum(map(int, fields[11:15])) / _TICKS
    found, queue = {}, [root]
    while queue:
        pid = queue.pop()
        found[pid] = seconds.get(pid, 0.0)
        queue += children.get(pid, [])
    return found


def pss(pids: Sequence[int]) -> int:
    """Return the proportional share of memory of PIDS, in bytes."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total


def _watch(root: int, pipe: Connection) -> None:
    peak = 0
    while not pipe.poll(0.05):
        peak = max(peak, pss(list(tree_of(root))))
    pipe.send(peak)


@dataclass
class Usage:
    """What a piece of work cost: seconds, CPU seconds, and peak memory in bytes."""

    wall: float = 0.0
    cpu: float = 0.0
    peak: int = 0


@dataclass
class Daemon:
    """One daemon with a fresh store in DIRECTORY, the same name for it and for us.

    :ivar command: its command line, to which the workload's options are added.
    :ivar build_users: the option that gives it build users.
    :ivar view: makes of a command line one that sees what the daemon needs.
    """

    name: str
    command: str
    build_users: str
    directory: Path
    view: Callable[[list[str]], list[str]]
    options: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """What a workload remembers of its preparation."""
    _process: subprocess.Popen[bytes] | None = None

    @property
    def store(self) -> str:
        return str(self.directory / "store")

    @property
    def socket(self) -> str:
        return str(self.directory / "state/daemon-socket/socket")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it with an empty store."""
        shutil.rmtree(self.directory, ignore_errors=True)
        for name in ("store", "state/daemon-socket", "log", "tmp", "etc", "home"):
            (self.directory / name).mkdir(parents=True)
        self.directory.chmod(0o755)
        for name, text in items.KEYS.items():
            (self.directory / "etc" / name).write_text(text)
        (self.directory / "etc/signing-key.sec").chmod(0o400)
        self._run()

    def _run(self) -> None:
        """Let clients connect at once, as its socket is handed to it."""
        environment = {
            "PATH": os.environ["PATH"],
            "LC_ALL": "C.UTF-8",
            "NIX_STORE_DIR": self.store,
            "GUIX_STATE_DIRECTORY": str(self.directory / "state"),
            "GUIX_DATABASE_DIRECTORY": str(self.directory / "state/db"),
            "GUIX_LOG_DIRECTORY": str(self.directory / "log"),
            "GUIX_CONFIGURATION_DIRECTORY": str(self.directory / "etc"),
            "TMPDIR": str(self.directory / "tmp"),
            "HOME": str(self.directory / "home"),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "VIEW_NET": "host",
        }
        command = [*shlex.split(self.command), self.build_users, *self.options]
        activate = 'exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        with (
            socket.socket(socket.AF_UNIX) as listening,
            (self.directory / "output").open("wb") as output,
        ):
            listening.bind(self.socket)
            listening.listen(128)
            self._process = subprocess.Popen(
                ["sh", "-c", activate, "sh", *self.view(command)],
                stdin=listening.fileno(), stdout=output, stderr=output, env=environment, cwd="/",
                # The kernel shares the processors out between sessions; one process per
                # client must not get more of them than one for all just by being more.
                start_new_session=True,
            )  # fmt: skip
        try:
            self.connect().close()
        except (OSError, EOFError) as error:
            said = (self.directory / "output").read_text(errors="replace")
            raise RuntimeError(f"{self.name} does not serve: {error}: {said[-2000:]}") from error

    def restart(self) -> None:
        """Stop it and start it again on the same store."""
        self._end()
        Path(self.socket).unlink(missing_ok=True)
        self._run()

    def stop(self) -> None:
        """Stop it, and remove its store."""
        self._end()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self) -> None:
        if self._process is not None:
            processes = list(tree_of(self._process.pid))
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            for pid in processes[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process = None

    def connect(
        self, jobs: int = 1, *, trace: bool = False, substitute_urls: str | None = None
    ) -> Client:
        options = {"jobs": jobs, "trace": trace, "substitute_urls": substitute_urls}
        return Client(self.socket).set_options(**options)  # type: ignore[arg-type]

    def memory(self) -> int:
        return pss(list(tree_of(self.pid)))

    @contextlib.contextmanager
    def measure(self, *, memory: bool = False) -> Iterator[Usage]:
        """Measure the body; peak memory only if asked, as looking costs CPU."""
        usage = Usage()
        ours, theirs = _fork.Pipe()
        watcher = _fork.Process(target=_watch, args=(self.pid, theirs)) if memory else None
        if watcher:
            watcher.start()
        before = sum(tree_of(self.pid).values())
        began = now()
        yield usage
        usage.wall = now() - began
        usage.cpu = sum(tree_of(self.pid).values()) - before
        if watcher:
            ours.send(None)
            usage.peak = ours.recv()
            watcher.join()


def _member(
    work: Callable[[Any], Any], prepare: Callable[[], Any], start: Barrier, answer: Connection
) -> None:
    prepared = prepare()
    start.wait()
    began = now()
    result = work(prepared)
    answer.send((began, now(), result))


def together(
    members: Sequence[tuple[Callable[[], Any], Callable[[Any], Any]]],
) -> tuple[float, list[Any]]:
    """Run clients at the same time, each in a process.

    :param members: pairs of a function that prepares, and one that works on what the
        first returned; all works begin together.
    :return: seconds from the first beginning to the last end, and the results.
    """
    start = _fork.Barrier(len(members))
    running = []
    for prepare, work in members:
        ours, theirs = _fork.Pipe()
        process = _fork.Process(target=_member, args=(work, prepare, start, theirs))
        process.start()
        theirs.close()
        running.append((process, ours))
    outcomes = []
    for process, answer in running:
        try:
            outcomes.append(answer.recv())
        except EOFError:
            start.abort()
            raise RuntimeError("a client failed") from None
        finally:
            process.join()
    wall = max(end for _, end, _ in outcomes) - min(began for began, _, _ in outcomes)
    return wall, [result for _, _, result in outcomes]


@contextlib.contextmanager
def journaled(directory: Path, gibibytes: int) -> Iterator[Path]:
    """Give a fresh ext4 with a journal, in a sparse file in DIRECTORY, to put stores on.

    Needs root and a mount namespace of our own, so that nothing is left mounted.
    """
    directory.mkdir(parents=True, exist_ok=True)
    image, place = directory / "fs.img", directory / "fs"
    place.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(gibibytes << 30)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-O", "has_journal", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop,noatime", str(image), str(place)], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=False)
    finally:
        image.unlink()


def in_private_mounts() -> None:
    """Start this program again in a mount namespace of its own, unless it is in one."""
    if os.environ.get("BENCH_MOUNTS") != "private":
        os.environ["BENCH_MOUNTS"] = "private"
        os.execvp(
            "unshare",
            ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv],
        )


def machine(directory: Path) -> dict[str, str]:
    """Return what one must know of this machine to understand the figures."""
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    fs = subprocess.run(
        ["df", "--output=fstype", str(directory)], capture_output=True, text=True, check=False
    ).stdout.split()[-1:]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": f"{len(cpu)} x {cpu[0] if cpu else os.uname().machine}",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') >> 20} MiB",
        "kernel": os.uname().release,
        "file system": f"{fs[0] if fs else '?'} with a journal, noatime, in a loop file",
        "python": sys.version.split()[0],
        "load before": json.dumps([round(value, 2) for value in os.getloadavg()]),
    }
