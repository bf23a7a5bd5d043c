"""The process that starts builders: small, with one thread, and old in nothing.

It gets requests from the daemon over a socket of packets, forks a process for each
build, and tells how it goes.  A packet is a JSON list; in a request to spawn a line
feed and the encoded `SandboxSpec` follow, unless that comes in a memory file.

Requests, with the descriptors that come along:
    ["spawn", id, kind, size] log [memory file of SIZE bytes]
                              KIND: "container", "user" (namespace) or "plain"
    ["signal", id, number]    to the builder and its process group
    ["kill-user", id, uid]
Answers:
    ["forked", id, pid]       the builder's process id, as the daemon sees it
    ["started", id]           set-up is done (before or after "forked")
    ["failed", id, phase, error number, text]
    ["exited", id, wait status, [user seconds, system seconds, most KiB resident]]
    ["done", id, text]        TEXT is empty if no process of the user is left
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import prctl

from guixd.sandbox import kernel, phases
from guixd.sandbox.spec import SandboxSpec

_Become = Callable[[SandboxSpec], None]

LARGEST_PACKET = 65536
"""Most bytes of a packet; longer specs come in a memory file."""


@dataclass(slots=True)
class _Child:
    """A process to wait for."""

    build: int
    kind: str
    """As in the request, or "helper"."""
    uid: int = 0
    """Whose processes a helper kills."""


def main(control: int) -> NoReturn:
    """Serve the daemon at the descriptor CONTROL until it hangs up."""
    _move(control, phases.CONTROL)
    _move(os.pidfd_open(os.getpid()), phases.ZYGOTE)
    os.setsid()
    os.umask(0o022)
    prctl.set_name("guixd-zygote")
    prctl.set_child_subreaper(1)
    kernel.clear_ambient_capabilities()
    prctl.cap_inheritable.limit()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    # Who stops the service signals all its processes: the daemon ends builds in order.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.disable()
    gc.freeze()
    try:
        _Zygote().serve()
    except Exception:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)  # Builders die with this process, see `phases`.


def _move(descriptor: int, to: int) -> None:
    if descriptor == to:
        os.set_inheritable(to, False)
    else:
        os.dup2(descriptor, to, inheritable=False)
        os.close(descriptor)


class _Zygote:
    def __init__(self) -> None:
        self._control = socket.socket(fileno=phases.CONTROL)
        self._children: dict[int, _Child] = {}
        self._pids: dict[int, int] = {}
        """Process ids of running builders by the number of the build."""
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._wake = wake_read

    def serve(self) -> None:
        """Answer requests and reap children; return when the daemon is gone."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            for descriptor, _event in poll.poll():
                if descriptor == self._wake:
                    os.read(self._wake, 4096)
                    self._reap()
                elif not self._receive():
                    return

    def _send(self, *answer: object) -> None:
        self._control.sendall(json.dumps(answer).encode(), socket.MSG_NOSIGNAL)

    def _receive(self) -> bool:
        data, descriptors, _flags, _ = socket.recv_fds(self._control, LARGEST_PACKET, 2)
        if not data:
            return False
        header, _, rest = data.partition(b"\n")
        what, number, *arguments = json.loads(header)
        try:
            if what == "spawn":
                kind, size = arguments
                self._spawn(number, kind, size, rest, *descriptors)
            elif what == "signal":
                self._signal(number, *arguments)
            elif what == "kill-user":
                self._kill_user(number, *arguments)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    # Builders.

    def _spawn(
        self, number: int, kind: str, size: int, data: bytes, log: int, memory: int = -1
    ) -> None:
        if memory >= 0:
            data = os.pread(memory, size, 0)

        def become(spec: SandboxSpec) -> None:
            signal.set_wakeup_fd(-1)
            phases.run(spec, log, lambda what, *more: self._send(what, number, *more))

        try:
            if kind == "container":
                pid = self._fork_container(become, data)
            elif kind == "user":
                pid = _fork_user(become, data)
            else:
                pid = _fork(lambda: become(SandboxSpec.decode(data)))
        except OSError as error:
            self._send("failed", number, "new process", *phases.describe(error))
            self._send("exited", number, 256, [0, 0, 0])
            return
        self._children[pid] = _Child(number, kind)
        self._pids[number] = pid
        self._send("forked", number, pid)

    def _fork_container(self, become: _Become, data: bytes) -> int:
        """Fork the first process of a new pid namespace."""
        kernel.unshare(kernel.NEWPID)
        try:
            return _fork(lambda: become(SandboxSpec.decode(data)))
        finally:
            kernel.setns(self._pid_namespace, kernel.NEWPID)

    def _signal(self, number: int, which: int) -> None:
        pid = self._pids.get(number)
        if pid is not None:
            _kill(os.kill, pid, which)
            _kill(os.killpg, pid, which)

    def _reap(self) -> None:
        while self._children:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            child = self._children.pop(found.si_pid, None)
            if child is not None and child.kind == "plain":
                # While it is not reaped no other group can have its number.
                _kill(os.killpg, found.si_pid, signal.SIGKILL)
            _pid, status, usage = os.wait4(found.si_pid, 0)
            if child is None:  # Left by a builder without a container.
                continue
            if child.kind == "helper" and os.WIFSIGNALED(status):
                self._kill_user(child.build, child.uid)  # Killed by what it was to kill.
            elif child.kind == "helper":
                self._send("done", child.build, "" if status == 0 else f"wait status {status}")
            else:
                del self._pids[child.build]
                times = [usage.ru_utime, usage.ru_stime, usage.ru_maxrss]
                self._send("exited", child.build, status, times)

    # Users.

    def _kill_user(self, number: int, uid: int) -> None:
        if uid in (0, os.getuid(), os.geteuid()):
            self._send("done", number, f"uid {uid} is not a build user's")
            return
        helper = os.fork()
        if helper == 0:
            try:
                _end_processes_of(uid)
                os._exit(0)
            finally:
                os._exit(1)
        self._children[helper] = _Child(number, "helper", uid)


def _kill(how: Callable[[int, int], None], pid: int, number: int) -> None:
    try:
        how(pid, number)
    except ProcessLookupError:
        pass


def _fork(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(1)
    return pid


def _fork_user(become: _Become, data: bytes) -> int:
    """Fork the first process of new user and pid namespaces; it becomes a child of this one.

    A process in between enters the namespaces, forks, and is gone.
    """
    told, tell = os.pipe()

    def between() -> None:
        try:
            spec = SandboxSpec.decode(data)
            assert spec.user_namespace is not None
            this = os.pidfd_open(os.getpid())
            phases.enter_user_namespace(spec.user_namespace)
            pid = os.fork()
            if pid == 0:
                # Or its parent's death would be taken for the zygote's.
                phases.is_dead(this, wait=True)
                become(spec)
            answer: tuple[int, str] = pid, ""
        except OSError as error:
            number, text = phases.describe(error)
            answer = -number, text
        os.write(tell, json.dumps(answer).encode())

    middle = _fork(between)
    os.close(tell)
    answer = os.read(told, 4096)
    os.close(told)
    os.waitpid(middle, 0)
    pid, text = json.loads(answer or b'[-5, "no answer"]')
    if pid < 0:
        raise OSError(-pid, f"user namespace: {text}")
    return int(pid)


def _end_processes_of(uid: int) -> None:
    """Become UID and kill all its other processes; return when they are dead."""
    resource.setrlimit(resource.RLIMIT_NPROC, (2, 2))
    os.setgroups(())
    os.setresuid(uid, uid, uid)
    if _is_alone():
        return
    # None of them can escape by forking: fork(2) fails when a signal is pending.
    while True:
        _kill(os.kill, -1, signal.SIGKILL)
        living = [pidfd for pidfd in _processes_of(uid) if not phases.is_dead(pidfd)]
        if not living:
            return
        for pidfd in living:
            phases.is_dead(pidfd, wait=True)
            os.close(pidfd)


def _is_alone() -> bool:
    """Whether the limit of two processes of this user allows this one a child."""
    try:
        pid = os.fork()
    except BlockingIOError:
        return False
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return True


def _processes_of(uid: int) -> Iterator[int]:
    """Yield a pidfd for each other process with the real or saved id UID."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            pidfd = os.pidfd_open(int(name))
        except OSError:
            continue
        try:
            status = kernel.read_file(f"/proc/{name}/status")
            ids = status.partition("\nUid:")[2].split(None, 4)[:3]
        except OSError:
            ids = []
        if str(uid) in ids:
            yield pidfd
        else:
            os.close(pidfd)
