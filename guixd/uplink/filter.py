"""What the process that moves packets may ask of the kernel (spec: sandbox §7).

It is in the machine's network namespace and deals with packets of a builder.  So it can
have sockets of the Internet only, none of those of the machine's own processes (abstract
names!), and no calls by which a process gets at another one, at namespaces or around
this filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_LOAD, _EQUAL, _GREATER, _RETURN = 0x20, 0x15, 0x25, 0x06
_ALLOW, _KILL, _DONE, _NO_SUCH_CALL = 0x7FFF0000, 0x80000000, 0x50000, 0x50000 | errno.ENOSYS
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_FAMILIES = 2, 10  # AF_INET and AF_INET6
_EVERYWHERE = 425, 426, 427, 435, 438  # io_uring_*, clone3, pidfd_getfd
_LAST_KNOWN = 466
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2


_GENERIC = 117, 270, 271, 97, 268, 217, 218, 219, 280, 282, 241
# The number of the machine; those of socket and socketpair, and of what is denied: ptrace,
# process_vm_readv, process_vm_writev, unshare, setns, add_key, request_key, keyctl, bpf,
# userfaultfd, perf_event_open and, if there is one, socketcall.
_MACHINES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, 41, 53, (101, 310, 311, 272, 308, 248, 249, 250, 321, 323, 298)),
    "i686": (0x40000003, 359, 360, (26, 347, 348, 310, 346, 286, 287, 288, 357, 374, 336, 102)),
    "aarch64": (0xC00000B7, 198, 199, _GENERIC),
    "riscv64": (0xC00000F3, 198, 199, _GENERIC),
    "armv7l": (0x40000028, 281, 288, (26, 376, 377, 337, 375, 309, 310, 311, 386, 388, 364)),
    "ppc64le": (0xC0000015, 326, 333, (26, 351, 352, 282, 350, 269, 270, 271, 361, 364, 319, 102)),
}


def filter_for(machine: str) -> bytes:
    """Return the filter for programs of MACHINE as uname(2) names it; empty if that is unknown."""
    if machine not in _MACHINES:
        return b""
    audit, socket, socketpair, denied = _MACHINES[machine]
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_GREATER, 0, 1, _LAST_KNOWN),
        (_RETURN, 0, 0, _NO_SUCH_CALL),
    ]
    for call in (*denied, *_EVERYWHERE):
        code += [(_EQUAL, 0, 1, call), (_RETURN, 0, 0, _NO_SUCH_CALL)]
    code += [
        # slirp4netns makes a pair before it knows whether it needs one.
        (_EQUAL, 0, 1, socketpair),
        (_RETURN, 0, 0, _DONE),
        (_EQUAL, 1, 0, socket),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 1, 0, _FAMILIES[0]),
        (_EQUAL, 0, 1, _FAMILIES[1]),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _NO_SUCH_CALL),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def install_filter(code: bytes) -> None:
    """Put this process and what it becomes under the filter CODE; gain no privileges any more.

    :raises OSError: the kernel has none, or does not take it.
    """
    kept = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(kept))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    zero = ctypes.c_ulong(0)
    for result in (
        prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero),
        prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), program, zero, zero),
    ):
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
