"""The system calls of a container that Python has no function for.

Numbers are those of the kernel's headers (spec: sandbox §12); each function raises
`OSError` with the name of the file concerned.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import socket
import struct
from collections.abc import Sequence

NEWNS = 0x00020000
NEWUTS = 0x04000000
NEWIPC = 0x08000000
NEWUSER = 0x10000000
NEWPID = 0x20000000
NEWNET = 0x40000000

MS_RDONLY = 1
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 0x40000
MNT_DETACH = 2

_MS_RELATIME = 0x200000
_ST_SAME_AS_MS = 1 | 2 | 4 | 8 | 1024 | 2048
_ST_RELATIME = 4096
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 1
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_KEYCTL_JOIN_SESSION_KEYRING = 1
_CLOSE_RANGE = 436
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "i686": 217, "armv7l": 218, "ppc64le": 203}
_KEYCTL = {"x86_64": 250, "i686": 288, "armv7l": 311, "ppc64le": 271}
_GENERIC_PIVOT_ROOT = 41
_GENERIC_KEYCTL = 219
_SIOCSIFFLAGS = 0x8914
_IFF_UP, _IFF_LOOPBACK, _IFF_RUNNING = 1, 8, 0x40

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_machine = platform.machine()


def _check(result: int, *about: str) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), *about)


def _syscall(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces of FLAGS for new ones."""
    _check(_libc.unshare(ctypes.c_int(flags)))


def setns(descriptor: int, flag: int) -> None:
    """Enter the namespace of DESCRIPTOR, whose kind is FLAG."""
    _check(_libc.setns(descriptor, ctypes.c_int(flag)))


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2); an empty KIND or OPTIONS is passed as a null pointer."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _check(result, target)


def make_read_only(target: str) -> None:
    """Make the mounts at and below TARGET read-only, whatever their other flags."""
    attributes = struct.pack("=4Q", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    name = os.fsencode(target)
    size = ctypes.c_size_t(len(attributes))
    result = _syscall(_MOUNT_SETATTR, _AT_FDCWD, name, _AT_RECURSIVE, attributes, size)
    if result == 0:
        return
    # Before Linux 5.12.  Flags that a mount has must be kept in a user namespace.
    present = os.statvfs(target).f_flag
    flags = present & _ST_SAME_AS_MS | (_MS_RELATIME if present & _ST_RELATIME else 0)
    mount("none", target, "", flags | MS_REMOUNT | MS_BIND | MS_RDONLY)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def pivot_root(new: str, old: str) -> None:
    """Make the mount point NEW the root of the mount namespace, and mount the former at OLD."""
    number = _PIVOT_ROOT.get(_machine, _GENERIC_PIVOT_ROOT)
    _check(_syscall(number, os.fsencode(new), os.fsencode(old)), new)


def close_from(descriptor: int) -> None:
    """Close DESCRIPTOR and all above it."""
    _check(_syscall(_CLOSE_RANGE, ctypes.c_uint(descriptor), ctypes.c_uint(0xFFFFFFFF), 0))


def set_personality(persona: int) -> None:
    """personality(2)."""
    _check(_libc.personality(ctypes.c_ulong(persona)))


def set_host_names(host: str, domain: str) -> None:
    """Name this UTS namespace."""
    socket.sethostname(host)
    name = domain.encode()
    _check(_libc.setdomainname(name, ctypes.c_size_t(len(name))))


def clear_ambient_capabilities() -> None:
    """Empty the ambient set, so that no program inherits a capability."""
    zero = ctypes.c_ulong(0)
    clear = ctypes.c_ulong(_PR_CAP_AMBIENT_CLEAR_ALL)
    _check(_libc.prctl(_PR_CAP_AMBIENT, clear, zero, zero, zero))


def join_new_session_keyring() -> None:
    """Replace the session keyring, which would be shared with the daemon, by an empty one."""
    number = _KEYCTL.get(_machine, _GENERIC_KEYCTL)
    _check(_syscall(number, _KEYCTL_JOIN_SESSION_KEYRING, None))


def bring_up_loopback() -> None:
    """Bring `lo` of this network namespace up; the kernel gives it its addresses."""
    flags = _IFF_UP | _IFF_LOOPBACK | _IFF_RUNNING
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags))


def write_file(path: str, text: str) -> None:
    """Write TEXT to an existing file such as those of /proc, at once."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def read_file(path: str) -> str:
    """Return the beginning of a file of /proc, enough for all that is needed here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 65536).decode("ascii", "replace")
    finally:
        os.close(descriptor)


def set_ids(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Become UID, GID and GROUPS for good, and look whether it is so."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    now = (os.getresuid(), os.getresgid(), sorted(os.getgroups()))
    if now != ((uid,) * 3, (gid,) * 3, sorted(groups)):
        raise PermissionError(1, f"ids are {now} instead of {uid}, {gid}, {groups}")
