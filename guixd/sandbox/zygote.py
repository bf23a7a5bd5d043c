"""The process that starts builders: small, with one thread, and old in nothing.

It gets requests from the daemon over a socket of packets, forks a process for each
build, and tells how it goes.  Processes for the next builds are forked ahead and wait,
with all done that no build differs in (see `guixd.sandbox.phases`).  A packet is a JSON
list.

Requests, with the descriptors that come along:
    ["begin", 0]              a file with the steps that containers begin with from now on
    ["spawn", id, kind, uid, own]
                              the builder's log; a file with its program; maybe a socket to
                              another process (see `guixd.uplink`)
                              KIND: "plain", "container", or a user namespace as a list
                              UID: all that runs as UID ends with it; 0 for none
                              OWN: false if it keeps the machine's network
    ["signal", id, number]    to the builder and its process group
    ["kill-user", id, uid]
Answers:
    ["started", id, pid]      set-up is done; PID is that of /proc
    ["failed", id, phase, error number, text]
    ["exited", id, wait status, [user seconds, system seconds, most KiB resident], alone]
                              ALONE: whether no process of UID is left for certain
    ["done", id, text]        TEXT is empty if no process of the user is left
"""

from __future__ import annotations

import gc
import json
import marshal
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import prctl

from guixd.sandbox import kernel, phases
from guixd.uplink.devices import move

# Each page of this process costs time at each fork, so it imports little.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_Kind = str | tuple[int, int, int, int, int | None]
"""What processes forked ahead differ in: "plain", "container", or a `spec.UserNamespace`."""
_LATER = 10
"""Milliseconds until others are forked ahead when a builder has begun."""
_FEWEST_WAITING = 2
_MOST_WAITING = 5
_NOBODY = 0xFFFFFFFD - os.getpid()
"""A user id that is given to nobody; another for each daemon, or they would kill each other."""
LARGEST_PACKET = 4096
"""Most bytes of a packet."""


class _Child:
    """A process to wait for.

    :ivar build: 0 if it waits for one.
    :ivar kind: None for a helper.
    :ivar uid: whose processes a helper kills, or the end of a builder.
    """

    __slots__ = ("build", "kind", "uid")

    def __init__(self, build: int, kind: _Kind | None, uid: int = 0) -> None:
        self.build, self.kind, self.uid = build, kind, uid


def main(control: int) -> NoReturn:
    """Serve the daemon at the descriptor CONTROL until it hangs up."""
    move(control, phases.CONTROL)
    move(os.pidfd_open(os.getpid()), phases.ZYGOTE)
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
    # A builder must not inherit this, nor does it: exec undoes handlers.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    gc.disable()
    gc.collect()
    gc.freeze()
    zygote = _Zygote()
    try:
        with suppress(ConnectionError):  # The daemon has been killed.
            zygote.serve()
    except Exception:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
    finally:
        # Builders die with this process, see `phases`, unless they have prevented that.
        for pid in [pid for pid, child in zygote.children.items() if child.kind]:
            _kill(os.killpg, pid, signal.SIGKILL)
        os._exit(0)


class _Zygote:
    """What serves the daemon.

    :ivar children: what is to be reaped, by process id.
    """

    def __init__(self) -> None:
        self._control = socket.socket(fileno=phases.CONTROL)
        self.children: dict[int, _Child] = {}
        self._pids: dict[int, int] = {}
        """Process ids of running builders by the number of the build."""
        self._kind: _Kind | None = None
        """Of the processes that wait."""
        self._beginning: Sequence[Any] = ()
        """What containers begin with."""
        self._rests = True
        """Whether no builder has begun since the last one has ended."""
        self._waiting: dict[int, socket.socket] = {}
        """Where the processes that wait get their programs, by process id."""
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
        self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY)
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def serve(self) -> None:
        """Answer requests and reap children; return when the daemon is gone."""
        poll = select.poll()
        poll.register(phases.CONTROL, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        poll.register(self._mounts, select.POLLPRI)
        while True:
            spare = self._kind is not None and len(self._waiting) < _FEWEST_WAITING
            # Who has just got a program needs the processor more than who will get another.
            delay = 0 if self._rests or not self._waiting else _LATER
            events = dict(poll.poll(delay if spare else None))
            if self._mounts in events:
                self._dismiss()  # They would not see what is mounted now.
            if self._wake in events:
                os.read(self._wake, 4096)
                self._reap()
            if phases.CONTROL in events:
                if not self._receive():
                    return
            elif spare and not events:
                self._fork_ahead()

    def _send(self, *answer: object) -> None:
        self._control.sendall(json.dumps(answer).encode(), socket.MSG_NOSIGNAL)

    def _receive(self) -> bool:
        data, descriptors, _flags, _ = socket.recv_fds(self._control, LARGEST_PACKET, 3)
        if not data:
            return False
        what, number, *arguments = json.loads(data)
        try:
            if what == "begin":
                self._dismiss()
                self._beginning = marshal.loads(kernel.read_all(os.dup(descriptors[0])))
            elif what == "spawn":
                self._spawn(descriptors, number, *arguments)
            elif what == "signal":
                self._signal(number, *arguments)
            elif what == "kill-user":
                self._kill_user(number, *arguments)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    # Builders.

    def _spawn(self, files: Sequence[int], number: int, name: Any, uid: int, own: bool) -> None:
        kind = name if isinstance(name, str) else tuple(name)
        if own and kind != self._kind:
            self._dismiss()
        try:
            pid = (own and self._hand_over(files)) or self._fork(kind, files, own)
        except OSError as error:
            self._send("failed", number, "new process", *phases.describe(error))
            self._send("exited", number, 256, [0, 0, 0], False)
            return
        self._rests = False
        if own:
            self._kind = kind
        self.children[pid] = _Child(number, kind, uid)
        self._pids[number] = pid

    def _hand_over(self, descriptors: Sequence[int]) -> int:
        """Give a build to a process that waits, and return its id; 0 if there is none."""
        while self._waiting:
            pid = next(iter(self._waiting))
            with self._waiting.pop(pid) as orders, suppress(ConnectionError):  # It has ended.
                socket.send_fds(orders, [b"!"], descriptors)
                return pid
        return 0

    def _fork_ahead(self) -> None:
        """Fork several at once, as each page that is touched after a fork must be copied.

        One only if that takes long, or if a builder is alone, whose end would have to wait.
        """
        kind, self._kind = self._kind, None
        assert kind is not None
        with suppress(OSError):  # The next build tells.
            while len(self._waiting) < _MOST_WAITING:
                self.children[self._fork(kind)] = _Child(0, kind)
                if isinstance(kind, tuple) or len(self._pids) < 2:
                    break
            self._kind = kind

    def _dismiss(self) -> None:
        """Let go all processes that wait, which end."""
        while self._waiting:
            self._waiting.popitem()[1].close()

    def _fork(self, kind: _Kind, descriptors: Sequence[int] = (), own: bool = True) -> int:
        """Return the id of a new process for a build, which waits if there are no DESCRIPTORS."""
        orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            if descriptors:
                socket.send_fds(orders, [b"!"], descriptors)

            def become() -> None:
                signal.set_wakeup_fd(-1)
                phases.serve(theirs, self._beginning if own and kind != "plain" else ())

            if isinstance(kind, tuple):
                pid = _fork_user(kind, become)
            elif kind == "container":
                kernel.unshare(kernel.NEWPID)
                try:
                    pid = _fork(become)
                finally:
                    kernel.setns(self._pid_namespace, kernel.NEWPID)
            else:
                pid = _fork(become)
            if descriptors:
                orders.close()
            else:
                self._waiting[pid] = orders
        return pid

    def _signal(self, number: int, which: int) -> None:
        pid = self._pids.get(number)
        if pid is not None:
            _kill(os.kill, pid, which)
            _kill(os.killpg, pid, which)

    def _reap(self) -> None:
        while self.children:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            child = self.children.pop(found.si_pid, None)
            plain = child is not None and child.kind == "plain"
            if plain:
                # While it is not reaped no other group can have its number.
                _kill(os.killpg, found.si_pid, signal.SIGKILL)
            _pid, status, usage = os.wait4(found.si_pid, 0)
            alone = plain and child is not None and child.uid != 0 and _has_none(child.uid)
            if child is None or (plain and not alone):
                self._end_strays()
            if child is None:
                continue
            if child.build == 0:
                if orders := self._waiting.pop(found.si_pid, None):
                    orders.close()
            elif child.kind is None and os.WIFSIGNALED(status):
                self._kill_user(child.build, child.uid)  # Killed by what it was to kill.
            elif child.kind is None:
                self._send("done", child.build, "" if status == 0 else f"wait status {status}")
            else:
                del self._pids[child.build]
                times = [usage.ru_utime, usage.ru_stime, usage.ru_maxrss]
                self._send("exited", child.build, status, times, alone)
                self._rests = True

    def _end_strays(self) -> None:
        """Kill what builders without a container left, when it can belong to none that runs.

        Their orphans have become children of this process.
        """
        if any(child.kind == "plain" and child.build for child in self.children.values()):
            return
        with suppress(FileNotFoundError):  # Not every kernel tells.
            for name in kernel.read_file("/proc/thread-self/children").split():
                if int(name) not in self.children:
                    _kill(os.kill, int(name), signal.SIGKILL)

    # Users.

    def _kill_user(self, number: int, uid: int) -> None:
        if uid in (0, os.getuid(), os.geteuid()):
            self._send("done", number, f"uid {uid} is not a build user's")
            return
        if _has_none(uid):
            self._send("done", number, "")
            return
        helper = os.fork()
        if helper == 0:
            try:
                _end_processes_of(uid)
                os._exit(0)
            finally:
                os._exit(1)
        self.children[helper] = _Child(number, None, uid)


def _kill(how: Callable[[int, int], None], pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        how(pid, number)


def _fork(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(1)
    return pid


def _fork_user(user: tuple[Any, ...], become: Callable[[], None]) -> int:
    """Fork the first process of new user and pid namespaces; it becomes a child of this one.

    A process in between enters the namespaces, forks, and is gone.
    """
    told, tell = os.pipe()

    def between() -> None:
        try:
            this = os.pidfd_open(os.getpid())
            phases.enter_user_namespace(*user)
            pid = os.fork()
            if pid == 0:
                # Or its parent's death would be taken for the zygote's.
                phases.is_dead(this, wait=True)
                become()
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


def _has_none(uid: int) -> bool:
    """Kill all processes of UID, and return whether there is certainly none.

    This process takes the power of UID only, and no id by which those could signal it.
    """
    if os.getresuid() != (0, 0, 0) or _is_real(_NOBODY):
        return False
    try:
        os.setresuid(_NOBODY, uid, 0)
    except OSError:  # In a user namespace without that id.
        return False
    try:
        os.kill(1, 0)
    except PermissionError:  # Else the powers of root are still here.
        _kill(os.kill, -1, signal.SIGKILL)
        return not _is_real(uid)
    finally:
        os.setresuid(0, 0, 0)
    return False


def _is_real(uid: int) -> bool:
    """Whether any process, which may have ended but not been reaped, has the real id UID."""
    try:
        os.getpriority(os.PRIO_USER, uid - (uid >> 31 << 32))  # a C int
    except ProcessLookupError:
        return False
    return True


def _end_processes_of(uid: int) -> None:
    """Become UID and kill all its other processes; return when they are dead."""
    os.setgroups(())
    os.setresuid(uid, uid, uid)
    prctl.cap_effective.limit()  # The secure bits may say that they are kept.
    # None of them can escape by forking: fork(2) fails when a signal is pending.
    while True:
        _kill(os.kill, -1, signal.SIGKILL)
        if not any(_end_of(int(name)) for name in os.listdir("/proc") if name.isdigit()):
            return


def _end_of(pid: int) -> bool:
    """Wait for the end of a killed process of this user; False if it is not, or has ended."""
    with suppress(ProcessLookupError, PermissionError):
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, 0)
            return pid != os.getpid() and not phases.is_dead(pidfd) and phases.is_dead(pidfd, True)
        finally:
            os.close(pidfd)
    return False
