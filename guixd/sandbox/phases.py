"""What a new process does to become the builder in its container (spec: sandbox §6).

What is the same for all builds it does at once, then it waits for the program of one
build, see `guixd.build.program`.  Phases are small functions run in order; the one that
fails is reported.  They run in a process with one thread, so they import nothing.
"""

from __future__ import annotations

import errno
import json
import marshal
import os
import select
import signal
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import prctl

from guixd.sandbox import kernel
from guixd.uplink import devices, filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

CONTROL = 3
"""Descriptor of the socket to the daemon, in the zygote and until the exec."""
ZYGOTE = 4
"""Descriptor of a pidfd of the zygote, likewise."""
_OWN_DESCRIPTORS_END = 5
_KVM_GID = 40000
"""The group that stands for the host's `kvm` in a user namespace."""
WAITING = "guixd-waiting"
"""Name of a process that has no build yet."""


def serve(orders: socket.socket, beginning: Sequence[tuple[str, str, Sequence[Any]]]) -> NoReturn:
    """Prepare this process for a build, wait for its program, and exec the builder.

    The program comes with the descriptor of the builder's output.  The daemon is told
    of success, or of the phase that failed; then the exit status is 1.

    :param orders: where the program comes from; its end ends the process.
    :param beginning: what to do before it comes, in the form of a program's steps.
    """
    failure: BaseException | None = None
    phase = "descriptors"
    os.umask(0)
    try:
        _detach(orders.fileno())
        for phase, call, arguments in (*PLAIN, *beginning):  # noqa: B007
            CALLS[call](*arguments)
    except BaseException as error:  # noqa: BLE001
        failure = error
        orders.shutdown(socket.SHUT_RD)  # Who has no program for it yet shall take another.
    try:
        pid = os.readlink(b"/proc/self")  # as the daemon knows it, even in a pid namespace
        _data, descriptors, _flags, _ = socket.recv_fds(orders, 1, 3)
        if not descriptors:
            os._exit(0)
        log, program, *link = descriptors
        number, steps, started, builder = marshal.loads(kernel.read_all(program))
        try:
            if failure is not None:
                raise failure
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            for descriptor in link:
                devices.move(descriptor, devices.LINK)
            for phase, call, arguments in steps:  # noqa: B007
                CALLS[call](*arguments)
            os.umask(0o022)
            os.write(CONTROL, started % pid)
        except BaseException as error:  # noqa: BLE001
            answer = json.dumps(["failed", number, phase, *describe(error)])
            os.write(CONTROL, answer.encode())
            os._exit(1)
        try:
            _execute(*builder)
        except BaseException as error:  # noqa: BLE001
            _say(f"error: cannot run builder '{builder[0]}': {describe(error, builder[0])[1]}")
    finally:
        os._exit(1)


def describe(error: BaseException, known: str = "") -> tuple[int, str]:
    """Return the number of ERROR, or 0, and a text that names its file unless that is KNOWN."""
    if not isinstance(error, OSError):
        return 0, f"{type(error).__name__}: {error}"
    text = error.strerror or str(error)
    name = os.fsdecode(error.filename or known)
    return error.errno or 0, text if name == known else f"{text}: {name}"


def _say(text: str) -> None:
    os.write(2, text.encode("utf-8", "surrogateescape") + b"\n")


# What needs no program.


def _detach(orders: int) -> None:
    """Keep no descriptor of anybody, and none but the null device, ORDERS and those above."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    kernel.close_range(_OWN_DESCRIPTORS_END, orders - 1)
    kernel.close_range(orders + 1)
    kernel.write_file("/proc/self/comm", WAITING)


def _keyring() -> None:
    with suppress(OSError):  # No keyrings here, or too many: none is needed.
        kernel.join_new_session_keyring()


def _out_of_memory() -> None:
    with suppress(OSError):  # Only an advice to the kernel whom to kill first.
        kernel.write_file("/proc/self/oom_score_adj", "1000")


def _die_with_zygote() -> None:
    """Die with the zygote.  To be repeated after each change of ids, which undoes it."""
    prctl.set_pdeathsig(signal.SIGKILL)
    if is_dead(ZYGOTE):
        os._exit(1)


PLAIN: Sequence[tuple[str, str, tuple[()]]] = (
    ("parent's death", "die_with_zygote", ()),
    ("keyring", "keyring", ()),
    ("out-of-memory score", "out_of_memory", ()),
)


# The calls of programs, with the umask 0.


def _make_directory(path: bytes, mode: int = 0o755) -> None:
    """Make a directory if there is none."""
    with suppress(FileExistsError):
        os.mkdir(path, mode)


def _make_file(path: bytes, mode: int, content: bytes = b"") -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    os.write(descriptor, content)
    os.close(descriptor)


def _bind(source: bytes, target: bytes, read_only: bool, optional: bool) -> None:
    try:
        mode = os.lstat(source).st_mode
    except FileNotFoundError:
        if optional:
            return
        raise
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(source), target)
        return
    if stat.S_ISDIR(mode):
        _make_directory(target)
    else:
        try:
            _make_file(target, 0o600)
        except FileExistsError:
            if not stat.S_ISREG(os.lstat(target).st_mode):
                raise
    # Without MS_REC a user namespace refuses what would uncover a mount below.
    kernel.mount(source, target, "", kernel.MS_BIND | kernel.MS_REC)
    if read_only:
        kernel.make_read_only(target)


def _mount_pts() -> None:
    if os.access("/dev/pts/ptmx", os.F_OK):
        with suppress(FileExistsError):
            os.symlink("/dev/pts/ptmx", "dev/ptmx")
            kernel.mount("none", "dev/pts", "devpts", 0, "newinstance,mode=0620")
            os.chmod("dev/pts/ptmx", 0o666)


def _pivot() -> None:
    """Enter the root; the old one is stacked on it for a moment, then gone."""
    kernel.pivot_root(".", ".")
    kernel.umount(".", kernel.MNT_DETACH)
    os.chroot(".")
    os.chdir("/")
    os.chmod("/", 0o555)


def _lock_mounts(uid: int) -> None:
    """Enter a second user and mount namespace, which cannot take mounts apart (§8)."""
    gids = [line.split()[0] for line in kernel.read_file("/proc/self/gid_map").splitlines()]
    maps = f"{uid} {uid} 1\n", "".join(f"{gid} {gid} 1\n" for gid in gids)
    if len(gids) == 1:
        kernel.unshare(kernel.NEWUSER | kernel.NEWNS)
        write_maps("self", *maps)
    else:  # Only a process that stays outside may map several ids.
        go = os.pipe()
        helper = os.fork()
        if helper == 0:
            try:
                os.read(go[0], 1)
                write_maps("1", *maps)
                os._exit(0)
            finally:
                os._exit(1)
        kernel.unshare(kernel.NEWUSER | kernel.NEWNS)
        os.write(go[1], b"!")
        if os.waitpid(helper, 0)[1] != 0:
            raise PermissionError(errno.EPERM, "cannot map the ids again")
        os.close(go[0])
        os.close(go[1])
    try:
        kernel.umount("/proc")
    except OSError as error:
        if error.errno == errno.EINVAL:
            return
        raise
    raise PermissionError(errno.EPERM, "mounts are not locked")


_OF_OS = os.chdir, os.chmod, os.symlink
_OF_KERNEL = kernel.mount, kernel.set_host_names, kernel.set_ids, kernel.set_personality
_OF_UPLINK = devices.bring_up_loopback, devices.offer_tap, devices.take_tap, filter.install_filter
_OWN = _bind, _die_with_zygote, _keyring, _lock_mounts, _make_directory, _make_file, _mount_pts
_MORE = kernel.unshare, kernel.write_file, _out_of_memory, _pivot
CALLS: Mapping[str, Callable[..., Any]] = {
    call.__name__.lstrip("_"): call for call in (*_OF_OS, *_OF_KERNEL, *_OF_UPLINK, *_OWN, *_MORE)
}


def _execute(
    program: str, store: str, arguments: list[bytes], environment: dict[bytes, bytes], *texts: str
) -> None:
    """Become the builder; what goes wrong is part of the build's log."""
    unsupported_platform, foreign_platform = texts
    if unsupported_platform:
        _say(unsupported_platform)
        return
    resolved = _resolve(program)
    if not resolved.startswith(store + "/"):
        _say(f"error: builder '{program}' is not in the store '{store}'")
        return
    try:
        os.execve(resolved, arguments, environment)
    except OSError as error:
        if error.errno == errno.ENOEXEC and foreign_platform:
            _say(foreign_platform)
        raise


def _resolve(program: str) -> str:
    """Return the name of PROGRAM without symbolic links."""
    opened = os.open(program, os.O_PATH)
    name = os.readlink(f"/proc/self/fd/{opened}")
    # The link may tell of a file elsewhere, such as one outside of the container.
    if not os.path.samestat(os.fstat(opened), os.lstat(name)):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return name


def is_dead(pidfd: int, wait: bool = False) -> bool:
    """Whether the process of PIDFD has ended; if WAIT, only return when it has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if wait else 0))


def write_maps(process: str, uid_map: str, gid_map: str) -> None:
    """Map the ids of the user namespace of PROCESS, a directory of /proc; no setgroups(2)."""
    for name, text in ("uid_map", uid_map), ("setgroups", "deny"), ("gid_map", gid_map):
        kernel.write_file(f"/proc/{process}/{name}", text)


def enter_user_namespace(
    uid: int, gid: int, host_uid: int, host_gid: int, kvm_gid: int | None
) -> None:
    """Become UID and GID in a new user namespace, and first of its next processes."""
    uid_map, gid_map = f"{uid} {host_uid} 1", f"{gid} {host_gid} 1"
    helper, go = (0, -1) if kvm_gid is None else _newgidmap(gid, host_gid, kvm_gid)
    kernel.unshare(kernel.NEWUSER | kernel.NEWPID)
    if helper:
        kernel.write_file("/proc/self/uid_map", uid_map)
        os.write(go, b"!")
        os.close(go)
        if os.waitpid(helper, 0)[1] == 0:
            return
        kernel.write_file("/proc/self/setgroups", "deny")
        kernel.write_file("/proc/self/gid_map", gid_map)
    else:
        write_maps("self", uid_map, gid_map)


def _newgidmap(gid: int, host_gid: int, kvm_gid: int) -> tuple[int, int]:
    """Return a process that maps two groups for this one when the pipe returned is written to."""
    wait, go = os.pipe()
    process = str(os.getpid())
    helper = os.fork()
    if helper:
        os.close(wait)
        return helper, go
    try:
        os.read(wait, 1)
        triples = (gid, host_gid, 1, _KVM_GID, kvm_gid, 1)
        null = os.open("/dev/null", os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        os.execvp("newgidmap", ["newgidmap", process, *map(str, triples)])
    finally:
        os._exit(127)
