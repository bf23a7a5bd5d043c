"""What a new process does to become the builder in its container (spec: sandbox §6).

The phases are small functions run in order; `run` reports the one that fails.
They run between fork and exec of a process with one thread, so they import nothing.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
from collections.abc import Callable, Sequence

import prctl

from guixd.sandbox import kernel
from guixd.sandbox.spec import Bind, File, SandboxSpec, UserNamespace

CONTROL = 3
"""Descriptor of the socket to the daemon, in the zygote and until the exec."""
ZYGOTE = 4
"""Descriptor of a pidfd of the zygote, likewise."""
_OWN_DESCRIPTORS_END = 5
_KVM_GID = 40000
"""The group that stands for the host's `kvm` in a user namespace."""

Phase = tuple[str, Callable[[SandboxSpec], None]]


def run(spec: SandboxSpec, log: int, report: Callable[..., None]) -> None:
    """Carry SPEC out and exec the builder; never returns.

    :param log: descriptor of the builder's standard output and error.
    :param report: called with `"started"`, or with `"failed"`, the phase, the
        error number and a text; then the process exits with status 1.
    """
    phase = "descriptors"
    try:
        _connect(log)
        for phase, function in PLAIN if spec.root is None else CONTAINER:  # noqa: B007
            function(spec)
        report("started")
    except BaseException as error:  # noqa: BLE001
        report("failed", phase, *describe(error))
        os._exit(1)
    try:
        _execute(spec)
    except BaseException as error:  # noqa: BLE001
        _say(f"error: cannot run builder '{spec.program}': {describe(error)[1]}")
    os._exit(1)


def describe(error: BaseException) -> tuple[int, str]:
    """Return the number of ERROR, or 0, and a text that names its file."""
    if not isinstance(error, OSError):
        return 0, f"{type(error).__name__}: {error}"
    text = error.strerror or str(error)
    return error.errno or 0, f"{text}: {error.filename}" if error.filename else text


def _say(text: str) -> None:
    os.write(2, text.encode("utf-8", "surrogateescape") + b"\n")


def _connect(log: int) -> None:
    """Make LOG standard output and error, and the null device standard input."""
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    kernel.close_from(_OWN_DESCRIPTORS_END)


def _signals(spec: SandboxSpec) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _keyring(spec: SandboxSpec) -> None:
    try:
        kernel.join_new_session_keyring()
    except OSError:  # No keyrings here, or too many: none is needed.
        pass


def _namespaces(spec: SandboxSpec) -> None:
    kernel.unshare(kernel.NEWNS | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS)


def _loopback(spec: SandboxSpec) -> None:
    if spec.loopback:
        kernel.bring_up_loopback()


def _host_names(spec: SandboxSpec) -> None:
    kernel.set_host_names("localhost", "(none)")


def _private_mounts(spec: SandboxSpec) -> None:
    # Fails in a process whose root is no mount point, such as below chroot(1).
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)


def _root(spec: SandboxSpec) -> None:
    """Make the root directory a mount point and the working directory."""
    assert spec.root is not None
    kernel.mount(spec.root, spec.root, "", kernel.MS_BIND | kernel.MS_REC)
    os.chdir(spec.root)


def _inside(path: str) -> str:
    return path.lstrip("/") or "."


def _parents(path: str) -> None:
    parent = os.path.dirname(path)
    if parent and not os.path.isdir(parent):
        os.makedirs(parent, exist_ok=True)


def _files(spec: SandboxSpec) -> None:
    for file in spec.files:
        _make(file, _inside(file.path))


def _make(file: File, path: str) -> None:
    _parents(path)
    if file.kind == "symlink":
        os.symlink(file.content, path)
        return
    if file.kind == "directory":
        try:
            os.mkdir(path, file.mode)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise
        os.chmod(path, file.mode)
    else:
        descriptor = _create(path, file.mode)
        os.write(descriptor, file.content.encode("utf-8", "surrogateescape"))
        os.close(descriptor)
    if file.gid is not None:
        os.chown(path, -1, file.gid, follow_symlinks=False)
        os.chmod(path, file.mode)


def _create(path: str, mode: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)


def _binds(spec: SandboxSpec) -> None:
    for bind in spec.binds:
        _bind(bind, _inside(bind.target))


def _bind(bind: Bind, target: str) -> None:
    try:
        mode = os.lstat(bind.source).st_mode
    except FileNotFoundError:
        if bind.optional:
            return
        raise
    _parents(target)
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(bind.source), target)
        return
    if stat.S_ISDIR(mode):
        if not os.path.isdir(target):
            os.mkdir(target)
    else:
        try:
            os.close(_create(target, 0o600))
        except FileExistsError:
            if not stat.S_ISREG(os.lstat(target).st_mode):
                raise
    # Without MS_REC a user namespace refuses what would uncover a mount below.
    kernel.mount(bind.source, target, "", kernel.MS_BIND | kernel.MS_REC)
    if bind.read_only:
        kernel.make_read_only(target)


def _proc(spec: SandboxSpec) -> None:
    os.makedirs("proc", exist_ok=True)
    kernel.mount("none", "proc", "proc")


def _shm(spec: SandboxSpec) -> None:
    if spec.shm:
        os.makedirs("dev/shm", exist_ok=True)
        kernel.mount("none", "dev/shm", "tmpfs")


def _pts(spec: SandboxSpec) -> None:
    if spec.devpts and os.path.exists("/dev/pts/ptmx") and not os.path.lexists("dev/ptmx"):
        os.makedirs("dev/pts", exist_ok=True)
        kernel.mount("none", "dev/pts", "devpts", 0, "newinstance,mode=0620")
        os.symlink("/dev/pts/ptmx", "dev/ptmx")
        os.chmod("dev/pts/ptmx", 0o666)


def _pivot(spec: SandboxSpec) -> None:
    """Enter the root; the old one is stacked on it for a moment, then gone."""
    kernel.pivot_root(".", ".")
    kernel.umount(".", kernel.MNT_DETACH)
    os.chroot(".")
    os.chdir("/")
    os.chmod("/", 0o555)


def _directory(spec: SandboxSpec) -> None:
    os.chdir(spec.directory)


def _personality(spec: SandboxSpec) -> None:
    kernel.set_personality(spec.personality)


def _out_of_memory(spec: SandboxSpec) -> None:
    try:
        kernel.write_file("/proc/self/oom_score_adj", "1000")
    except OSError:  # Only an advice to the kernel whom to kill first.
        pass


def _locked_mounts(spec: SandboxSpec) -> None:
    """Enter a second user and mount namespace, which cannot take mounts apart (§8)."""
    if spec.user_namespace is None:
        return
    gids = [line.split()[0] for line in kernel.read_file("/proc/self/gid_map").splitlines()]
    uid = spec.user_namespace.uid
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


def _identity(spec: SandboxSpec) -> None:
    if spec.ids is not None:
        kernel.set_ids(spec.ids.uid, spec.ids.gid, spec.ids.groups)


def _death(spec: SandboxSpec) -> None:
    """Die with the zygote.  After the last change of ids, which would undo it."""
    prctl.set_pdeathsig(signal.SIGKILL)
    if is_dead(ZYGOTE):
        os._exit(1)


def is_dead(pidfd: int, wait: bool = False) -> bool:
    """Whether the process of PIDFD has ended; if WAIT, only return when it has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if wait else 0))


PLAIN: Sequence[Phase] = (
    ("signals", _signals),
    ("keyring", _keyring),
    ("working directory", _directory),
    ("personality", _personality),
    ("out-of-memory score", _out_of_memory),
    ("identity", _identity),
    ("parent's death", _death),
)

CONTAINER: Sequence[Phase] = (
    ("signals", _signals),
    ("keyring", _keyring),
    ("namespaces", _namespaces),
    ("loopback", _loopback),
    ("host names", _host_names),
    ("private mounts", _private_mounts),
    ("root directory", _root),
    ("files", _files),
    ("bind mounts", _binds),
    ("mount /proc", _proc),
    ("mount /dev/shm", _shm),
    ("mount /dev/pts", _pts),
    ("pivot root", _pivot),
    ("working directory", _directory),
    ("personality", _personality),
    ("out-of-memory score", _out_of_memory),
    ("locked mounts", _locked_mounts),
    ("identity", _identity),
    ("parent's death", _death),
)


def _execute(spec: SandboxSpec) -> None:
    """Become the builder; what goes wrong is part of the build's log."""
    if spec.unsupported_platform:
        _say(spec.unsupported_platform)
        return
    program = os.path.realpath(spec.program, strict=True)
    if not program.startswith(spec.store + "/"):
        _say(f"error: builder '{spec.program}' is not in the store '{spec.store}'")
        return
    try:
        os.execve(program, spec.arguments, dict(spec.environment))
    except OSError as error:
        if error.errno == errno.ENOEXEC and spec.foreign_platform:
            _say(spec.foreign_platform)
        raise


def write_maps(process: str, uid_map: str, gid_map: str) -> None:
    """Map the ids of the user namespace of PROCESS, a directory of /proc; no setgroups(2)."""
    for name, text in ("uid_map", uid_map), ("setgroups", "deny"), ("gid_map", gid_map):
        kernel.write_file(f"/proc/{process}/{name}", text)


def enter_user_namespace(user: UserNamespace) -> None:
    """Become `user.uid` and `user.gid` in a new user namespace, and first of its next processes."""
    uid_map = f"{user.uid} {user.host_uid} 1"
    gid_map = f"{user.gid} {user.host_gid} 1"
    helper, go = _newgidmap(user) if user.kvm_gid is not None else (0, -1)
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


def _newgidmap(user: UserNamespace) -> tuple[int, int]:
    """Return a process that maps two groups for this one when the pipe returned is written to."""
    wait, go = os.pipe()
    process = str(os.getpid())
    helper = os.fork()
    if helper:
        os.close(wait)
        return helper, go
    try:
        os.read(wait, 1)
        triples = (user.gid, user.host_gid, 1, _KVM_GID, user.kvm_gid, 1)
        null = os.open("/dev/null", os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        os.execvp("newgidmap", ["newgidmap", process, *map(str, triples)])
    finally:
        os._exit(127)
