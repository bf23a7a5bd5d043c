"""How helpers that read what strangers send give up all that the daemon may.

They keep the network and the descriptors that they have.  Their file system is an empty one
with copies of what the C library needs to find servers.  As root they become a user that
has nothing else; without root they get a user namespace, in which no other process can
be seen or signalled.  To be called in a process with one thread, with all modules loaded.
(Spec: downloads §8, substitutes §10.)
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import prctl

from guixd.sandbox import kernel
from guixd.sandbox.phases import write_maps

UIDS = (2_147_400_017, 65534)
"""Ids that nothing else has; the first that can be had is taken."""
BROWSER_UIDS = (2_147_400_018, 65534)
"""The same for another process, so that neither can send signals to the other."""
RESOLVER_FILES = (
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/services",
)
_MOUNT_POINT = "/proc"
"""What the empty file system is mounted on, to become the root; any directory would do."""
_MOST_FILE = 4 << 20
_MOST_MEMORY = 4 << 30
_MOST_OPEN = 4096


def confine(files: Sequence[str] = (), uids: Sequence[int] = UIDS) -> None:
    """Give everything up; FILES can still be read afterwards, as they are now.

    :param uids: who to become, as root.
    :raises OSError: something that should be given up could not be.
    """
    copies = {name: _read(name) for name in (*RESOLVER_FILES, *files)}
    root = os.geteuid() == 0
    spaces = kernel.NEWNS | kernel.NEWIPC | kernel.NEWUTS
    if root:
        kernel.unshare(spaces)
    else:
        _enter_user_namespace(spaces)
    _enter_empty_root({name: data for name, data in copies.items() if data is not None})
    _limit()
    _drop_capabilities()
    if root:
        _become_nobody(uids)
    prctl.cap_effective.limit()
    prctl.cap_permitted.limit()
    prctl.set_no_new_privs(1)
    prctl.set_dumpable(0)


def _read(name: str) -> bytes | None:
    try:
        with Path(name).open("rb") as file:
            return file.read(_MOST_FILE)
    except OSError:
        return None


def _enter_user_namespace(spaces: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(kernel.NEWUSER | kernel.NEWPID | spaces)
    write_maps("self", f"{uid} {uid} 1", f"{gid} {gid} 1")
    alive = os.pidfd_open(os.getpid())
    child = os.fork()
    if child:
        _wait_for(child)
    prctl.set_pdeathsig(signal.SIGKILL)
    from guixd.sandbox.phases import is_dead

    if is_dead(alive):
        os._exit(1)
    os.close(alive)


def _wait_for(child: int) -> None:
    """Do nothing, with nothing, until CHILD has ended; then end like it."""
    kernel.close_range(3)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    status = os.waitpid(child, 0)[1]
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _enter_empty_root(files: dict[str, bytes]) -> None:
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("guixd-fetcher", _MOUNT_POINT, "tmpfs", 0, "mode=755,size=16m")
    os.chdir(_MOUNT_POINT)
    for name, data in files.items():
        relative = name.lstrip("/")
        os.makedirs(os.path.dirname(relative) or ".", exist_ok=True)
        Path(relative).write_bytes(data)
    try:
        kernel.pivot_root(".", ".")
        kernel.umount(".", kernel.MNT_DETACH)
    except OSError:
        if os.geteuid() != 0:
            raise
        os.chroot(".")  # Where `/` is no mount point, such as below chroot(1).
    os.chdir("/")
    kernel.make_read_only("/")


def _limit() -> None:
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, _MOST_MEMORY),
    ):
        resource.setrlimit(kind, (most, most))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = _MOST_OPEN if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _drop_capabilities() -> None:
    with suppress(OSError):
        kernel.clear_ambient_capabilities()
    prctl.capbset.limit()
    prctl.cap_inheritable.limit()


def _become_nobody(uids: Sequence[int]) -> None:
    for uid in uids:
        try:
            kernel.set_ids(uid, uid, ())
        except OSError:
            if uid == uids[-1]:
                raise
        else:
            return
