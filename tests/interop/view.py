"""Run a command with a directory as its root and other directories, or files, at places in it.

    python -I -S view.py BASE USER [SOURCE:PLACE]... -- COMMAND...

The mount and network namespaces are the command's own (with VIEW_NET=host, the network
is the machine's).  The root is a tmpfs with the entries of BASE bound into it, so that
PLACE need not exist in BASE and nothing is made there.  /proc, /sys, /dev and /tmp are
those of the machine; /mnt is empty.  USER is a uid, or "-".

A program of its own, in one process: a daemon started by it has the process id that
was told to it by socket activation.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import warnings  # noqa: F401 (os.execvp wants it when Python's own files are out of sight)
from typing import NoReturn

_NEWNS, _NEWNET = 0x00020000, 0x40000000
_BIND, _REC, _PRIVATE, _DETACH = 4096, 16384, 1 << 18, 2
_PIVOT_ROOT = {"x86_64": 155, "i686": 217, "armv7l": 218, "ppc64le": 203}
_SHARED = ("/proc", "/sys", "/dev", "/tmp")
_NEW = "/mnt"
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, *about: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), *about)


def _mount(source: str, target: str, kind: str = "none", flags: int = _BIND | _REC) -> None:
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None
    )
    _check(result, target)


def _bring_lo_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sH22x", b"lo", 1))


def _spread(base: str, directory: str, points: set[str]) -> None:
    """Make DIRECTORY of the new root, with a mount for each entry that BASE has in it.

    :param points: directories that are to be spread in turn, as something belongs into them.
    """
    with os.scandir(base + directory or "/") as entries:
        for entry in entries:
            place = f"{directory}/{entry.name}"
            if place == _NEW:
                os.mkdir(_NEW + place)
            elif entry.is_symlink():
                os.symlink(os.readlink(entry.path), _NEW + place)
            elif entry.is_dir():
                os.mkdir(_NEW + place)
                if place in points:
                    _spread(base, place, points)
                else:
                    _mount(place if place in _SHARED else entry.path, _NEW + place)
            elif entry.is_file():
                os.close(os.open(_NEW + place, os.O_CREAT))
                _mount(entry.path, _NEW + place)


def main(base: str, user: str, *rest: str) -> NoReturn:
    """Enter the view and become the command."""
    end = rest.index("--")
    binds = [bind.split(":") for bind in rest[:end]]
    command = rest[end + 1 :]
    points = set()
    for _, place in binds:
        while place := place.rpartition("/")[0]:
            points.add(place)
    here = os.getcwd()
    own_network = os.environ.get("VIEW_NET") != "host"
    _check(_libc.unshare(_NEWNS | (_NEWNET if own_network else 0)))
    if own_network:
        _bring_lo_up()
    _mount("none", "/", flags=_REC | _PRIVATE)
    _mount("view", _NEW, "tmpfs", 0)
    os.chmod(_NEW, 0o755)
    os.umask(0o022)
    _spread(base.rstrip("/"), "", points)
    for source, place in binds:
        if os.path.isdir(source):
            os.makedirs(_NEW + place, exist_ok=True)
        elif not os.path.exists(_NEW + place):
            os.close(os.open(_NEW + place, os.O_CREAT))
        _mount(source, _NEW + place)
    os.chdir(_NEW)
    _check(_libc.syscall(ctypes.c_long(_PIVOT_ROOT.get(os.uname().machine, 41)), b".", b"."))
    _check(_libc.umount2(b".", _DETACH))
    os.chroot(".")
    os.chdir(here if os.path.isdir(here) else "/")
    if user != "-":
        os.setgroups([])
        os.setresgid(int(user), int(user), int(user))
        os.setresuid(int(user), int(user), int(user))
    for ignored in signal.SIGPIPE, signal.SIGXFSZ:  # by Python
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
