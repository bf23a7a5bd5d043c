"""The system calls of a container that Python has no function for.

Numbers are those of the kernel's headers (spec: sandbox §12); each function raises
`OSError` with the name of the file concerned.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_int, c_long, c_size_t, c_uint, c_ulong

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
_machine = os.uname().machine
_PIVOT_ROOT = {"x86_64": 155, "i686": 217, "armv7l": 218, "ppc64le": 203}.get(_machine, 41)
_KEYCTL = {"x86_64": 250, "i686": 288, "armv7l": 311, "ppc64le": 271}.get(_machine, 219)
_READ_ONLY = struct.pack("=4Q", _MOUNT_ATTR_RDONLY, 0, 0, 0)

_libc = ctypes.CDLL(None, use_errno=True)


def _function(name: str, *types: type) -> Callable[..., int]:
    """Return a function of the C library; with its types known it is called faster."""
    function = _libc[name]
    function.argtypes = types
    function.restype = c_long if name == "syscall" else c_int
    return function


_unshare = _function("unshare", c_int)
_setns = _function("setns", c_int, c_int)
_mount = _function("mount", c_char_p, c_char_p, c_char_p, c_ulong, c_char_p)
_umount = _function("umount2", c_char_p, c_int)
_personality = _function("personality", c_ulong)
_setdomainname = _function("setdomainname", c_char_p, c_size_t)
_prctl = _function("prctl", c_int, c_ulong, c_ulong, c_ulong, c_ulong)
_close_range = _function("syscall", c_long, c_uint, c_uint, c_uint)
_mount_setattr = _function("syscall", c_long, c_int, c_char_p, c_uint, c_char_p, c_size_t)
_pivot_root = _function("syscall", c_long, c_char_p, c_char_p)
_keyctl = _function("syscall", c_long, c_int, c_char_p)

Name = str | bytes


def _check(result: int, *about: Name) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), *about)
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces of FLAGS for new ones."""
    _check(_unshare(flags))


def setns(descriptor: int, flag: int) -> None:
    """Enter the namespace of DESCRIPTOR, whose kind is FLAG."""
    _check(_setns(descriptor, flag))


def mount(source: Name, target: Name, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2); an empty KIND or OPTIONS is passed as a null pointer."""
    name = os.fsencode(target)
    words = kind.encode() or None, flags, options.encode() or None
    _check(_mount(os.fsencode(source), name, *words), target)


def make_read_only(target: Name) -> None:
    """Make the mounts at and below TARGET read-only, whatever their other flags."""
    name = os.fsencode(target)
    if _mount_setattr(_MOUNT_SETATTR, _AT_FDCWD, name, _AT_RECURSIVE, _READ_ONLY, 32) == 0:
        return
    # Before Linux 5.12.  Flags that a mount has must be kept in a user namespace.
    present = os.statvfs(target).f_flag
    flags = present & _ST_SAME_AS_MS | (_MS_RELATIME if present & _ST_RELATIME else 0)
    mount("none", target, "", flags | MS_REMOUNT | MS_BIND | MS_RDONLY)


def umount(target: Name, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_umount(os.fsencode(target), flags), target)


def pivot_root(new: Name, old: Name) -> None:
    """Make the mount point NEW the root of the mount namespace, and mount the former at OLD."""
    _check(_pivot_root(_PIVOT_ROOT, os.fsencode(new), os.fsencode(old)), new)


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """Close the descriptors from FIRST to LAST, if any."""
    if first <= last:
        _check(_close_range(_CLOSE_RANGE, first, last, 0))


def set_personality(persona: int) -> None:
    """personality(2)."""
    _check(_personality(persona))


def set_host_names(host: str, domain: str) -> None:
    """Name this UTS namespace."""
    socket.sethostname(host)
    name = domain.encode()
    _check(_setdomainname(name, len(name)))


def clear_ambient_capabilities() -> None:
    """Empty the ambient set, so that no program inherits a capability."""
    _check(_prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))


def join_new_session_keyring() -> None:
    """Replace the session keyring, which would be shared with the daemon, by an empty one."""
    _check(_keyctl(_KEYCTL, _KEYCTL_JOIN_SESSION_KEYRING, None))


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


def read_all(descriptor: int) -> bytes:
    """Return what is in a file of memory, and close it."""
    data = os.pread(descriptor, os.lseek(descriptor, 0, os.SEEK_END), 0)
    os.close(descriptor)
    return data


def set_ids(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Become UID, GID and GROUPS for good, and look whether it is so."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    now = (os.getresuid(), os.getresgid(), sorted(os.getgroups()))
    if now != ((uid,) * 3, (gid,) * 3, sorted(groups)):
        raise PermissionError(1, f"ids are {now} instead of {uid}, {gid}, {groups}")
