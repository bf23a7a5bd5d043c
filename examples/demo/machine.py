"""What of this machine the demo may use, and what it must not disturb."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
from pathlib import Path

BUILD_USERS = 4
_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_SETTINGS = (
    ("kernel/unprivileged_userns_clone", "0", "1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ("user/max_user_namespaces", "0", "10000"),
)


def free_ids() -> tuple[int, int]:
    """Return the first of `BUILD_USERS` user ids and a group id that nothing uses."""
    users = {entry.pw_uid for entry in pwd.getpwall()} | _running_users()
    groups = {entry.gr_gid for entry in grp.getgrall()}
    groups |= {entry.pw_gid for entry in pwd.getpwall()}
    subordinate = _subordinate_users()
    first = 60601
    while any(
        uid in users or any(begin <= uid < end for begin, end in subordinate)
        for uid in range(first, first + BUILD_USERS)
    ):
        first += BUILD_USERS
    gid = 60600
    while gid in groups:
        gid += 1
    return first, gid


def _running_users() -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.add(entry.stat().st_uid)
            except OSError:
                pass  # it has just ended
    return found


def _subordinate_users() -> list[tuple[int, int]]:
    try:
        lines = Path("/etc/subuid").read_text().splitlines()
    except OSError:
        return []
    ranges = [line.split(":")[1:3] for line in lines if line.count(":") == 2]
    return [(int(begin), int(begin) + int(count)) for begin, count in ranges]


def why_no_user_namespaces() -> str | None:
    """Return None if this user can make containers, else what to do about it."""
    child = os.fork()
    if child == 0:
        libc = ctypes.CDLL(None)
        flags = ctypes.c_ulong(1 << 18 | 1 << 14)  # MS_PRIVATE | MS_REC
        ok = libc.unshare(_NEWUSER | _NEWNS) == 0 and not libc.mount(None, b"/", None, flags, None)
        os._exit(0 if ok else 1)
    if os.waitpid(child, 0)[1] == 0:
        return None
    for name, bad, good in _SETTINGS:
        try:
            value = Path("/proc/sys", name).read_text().strip()
        except OSError:
            continue
        if value == bad:
            return f"sudo sysctl {name.replace('/', '.')}={good}"
    return "run it as root, or where unprivileged user namespaces are allowed"


def namespaces() -> dict[str, str]:
    """Return the namespaces of this process: kind to a name such as `mnt:[4026531841]`."""
    directory = Path("/proc/self/ns")
    names = (os.readlink(entry) for entry in directory.iterdir() if "_for_" not in entry.name)
    return {name.partition(":")[0]: name for name in names}
