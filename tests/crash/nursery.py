"""A process that has imported the daemon, and forks one whenever a test wants to kill it.

So a start takes a tenth of the time, and nothing of a killed daemon outlives it unseen:
the nursery becomes the parent of all that the daemon leaves behind.
"""

from __future__ import annotations

import atexit
import itertools
import json
import mmap
import os
import select
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import prctl

from guixd import faults

CHECKOUT = Path(__file__).parents[2]
WAIT = 30.0
"""Seconds after which something hangs, so that the test fails."""
_SEEN = (f"{CHECKOUT}/guixd/store/", f"{CHECKOUT}/guixd/build/")
_COUNT = struct.Struct("=q")


@dataclass(frozen=True)
class Death:
    """How a daemon ended.

    :ivar by_itself: whether a fault killed it, rather than the nursery.
    :ivar survivors: command lines of processes that it left behind.
    :ivar calls: how many system calls have been counted since they were last armed.
    """

    by_itself: bool
    status: int
    survivors: Sequence[str]
    calls: int


class Nursery:
    """Where daemons come from, one at a time."""

    _shared: Nursery | None = None

    def __init__(self) -> None:
        self._socket, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(WAIT)
        with far:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(far.fileno())],
                cwd=CHECKOUT,
                env={**os.environ, faults.VARIABLE: "", "PYTHONDONTWRITEBYTECODE": "1"},
                pass_fds=[far.fileno()],
            )

    @classmethod
    def shared(cls) -> Nursery:
        """Return the one of this process."""
        if cls._shared is None:
            cls._shared = cls()
            atexit.register(cls._shared.close)
        return cls._shared

    def close(self) -> None:
        """Kill the daemon, if one runs, and the nursery."""
        self._socket.close()
        self._process.wait(WAIT)

    def start(self, arguments: Sequence[str], environ: Mapping[str, str], log: str) -> None:
        """Start a daemon, and wait until it serves.

        :param log: the file that its standard error is appended to.
        """
        self._ask("start", list(arguments), dict(environ), log)

    def arm(self, fault: str = "", calls: int = 0) -> None:
        """Let the daemon die later.

        :param fault: at this point, see `guixd.faults`.
        :param calls: at this step to or from a system call of store or builds, from now on.
        """
        self._ask("arm", fault, calls)

    def end(self, patience: float) -> Death:
        """Wait some seconds for the daemon to die, then kill it, and wait for the end of all."""
        return Death(*self._ask("end", patience))

    def _ask(self, *command: Any) -> Any:
        self._socket.send(json.dumps(command).encode())
        answer = json.loads(self._socket.recv(1 << 20) or '{"error": "the nursery died"}')
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["result"]


# --- in the daemon ------------------------------------------------------------------


class Calls:
    """Counts steps to and from calls of the operating system and the database, in all threads.

    :param shared: where the count is told.
    """

    def __init__(self, shared: mmap.mmap) -> None:
        self._shared = shared
        self.arm(0)

    def arm(self, last: int) -> None:
        """Count from 0, and die at the step LAST; 0 for never."""
        self._last = last
        self._steps = itertools.count(1)

    def install(self) -> None:
        """Look at what this thread and those that it begins do."""
        sys.setprofile(self)
        threading.setprofile(self)

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if (
            (event == "c_call" or event == "c_return")
            and frame.f_code.co_filename.startswith(_SEEN)
            and (arg.__module__ in ("posix", "_fcntl", "fcntl") or _of_database(arg))
        ):
            step = next(self._steps)
            if step == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            _COUNT.pack_into(self._shared, 0, step)


def _of_database(function: Any) -> bool:
    return isinstance(getattr(function, "__self__", None), sqlite3.Cursor | sqlite3.Connection)


def _daemon(
    arguments: list[str], environ: dict[str, str], log: str, control: socket.socket, calls: Calls
) -> None:
    """Be a daemon, from its command line on."""
    prctl.set_pdeathsig(signal.SIGKILL)  # should the test be killed, and the nursery end with it
    os.setsid()
    os.environ.clear()
    os.environ.update(environ)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 2)
    os.dup2(fd, 1)
    os.close(fd)
    from guixd.service.options import settings_or_exit
    from guixd.service.tap import run

    settings = settings_or_exit(arguments, os.environ)
    from twisted.internet import reactor as installed

    reactor: Any = installed

    def obey() -> None:
        while order := control.recv(1 << 16):
            fault, last = json.loads(order)
            assert faults.fault is not None
            faults.fault.arm(fault)
            calls.arm(last)
            control.send(b"armed")

    threading.Thread(target=obey, daemon=True).start()
    calls.install()
    reactor.callWhenRunning(control.send, b"ready")
    raise SystemExit(run(settings))


# --- in the nursery --------------------------------------------------------------------


class _Nurse:
    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self._pid = 0
        self._pidfd = -1
        self._control: socket.socket | None = None

    def start(self, arguments: list[str], environ: dict[str, str], log: str) -> None:
        assert not self._pid, "there is a daemon"
        _COUNT.pack_into(self._shared, 0, 0)
        self._control, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(WAIT)
        self._pid = os.fork()
        if not self._pid:
            status = 1
            try:
                self._control.close()
                _daemon(arguments, environ, log, far, Calls(self._shared))
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:  # noqa: BLE001
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)
        far.close()
        self._pidfd = os.pidfd_open(self._pid)
        if self._control.recv(100) != b"ready":
            raise AssertionError(f"a daemon did not start: {Path(log).read_text()}")

    def arm(self, fault: str, calls: int) -> None:
        assert self._control is not None
        self._control.send(json.dumps([fault, calls]).encode())
        assert self._control.recv(100) == b"armed"

    def end(self, patience: float) -> tuple[bool, int, list[str], int]:
        by_itself = bool(select.select([self._pidfd], [], [], patience)[0])
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        os.close(self._pidfd)
        assert self._control is not None
        self._control.close()
        self._pid = 0
        count = _COUNT.unpack_from(self._shared)[0]
        return by_itself, os.waitstatus_to_exitcode(status), _bury(), count


def _bury() -> list[str]:
    """Wait until all processes that became children have ended; return those that did not."""
    deadline = time.monotonic() + WAIT / 3
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return []
        time.sleep(0.002)  # there is no event for the end of any child
    mine = str(os.getpid())
    children = Path(f"/proc/{mine}/task/{mine}/children").read_text().split()
    lines = []
    for child in children:
        lines.append(Path(f"/proc/{child}/cmdline").read_text().replace("\0", " "))
        os.kill(int(child), signal.SIGKILL)
    return lines


def main(number: int) -> None:
    """Obey the test at the other end of the socket NUMBER until it closes that."""
    import gc

    import guixd.service.builder
    import guixd.service.tap  # noqa: F401

    prctl.set_child_subreaper(1)
    gc.freeze()
    test = socket.socket(fileno=number)
    nurse = _Nurse()
    while command := test.recv(1 << 20):
        name, *arguments = json.loads(command)
        try:
            answer = {"result": getattr(nurse, name)(*arguments)}
        except (AssertionError, OSError, ValueError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        test.send(json.dumps(answer).encode())
    if nurse._pid:
        nurse.end(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
