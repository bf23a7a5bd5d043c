"""The filter of system calls."""

from __future__ import annotations

import ctypes
import platform
import socket
import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

from guixd.uplink import filter
from guixd.uplink.filter import filter_for
from tests.support import require

_DENIED = (
    "ptrace", "process_vm_readv", "process_vm_writev", "unshare", "setns", "add_key", "request_key",
    "keyctl", "bpf", "userfaultfd", "perf_event_open", "socketcall",
)  # fmt: skip
_EVERYWHERE = ("io_uring_setup", "io_uring_enter", "io_uring_register", "clone3", "pidfd_getfd")

_TRIES = """
import ctypes, errno, os, platform, socket
from guixd.uplink.filter import filter_for, install_filter

install_filter(filter_for(platform.machine()))
libc = ctypes.CDLL(None, use_errno=True)

def attempt(label, result):
    print(label, errno.errorcode[ctypes.get_errno()] if result < 0 else "done")

for name in "AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK":
    attempt(name, libc.socket(getattr(socket, name), socket.SOCK_DGRAM, 0))
attempt("padded", libc.syscall(ctypes.c_long(SOCKET), ctypes.c_long(1 << 32 | 1), 2, 0))
pair = (ctypes.c_int * 2)(-1, -1)
attempt("socketpair", libc.socketpair(1, 2, 0, pair))
print("pair", *pair)
attempt("ptrace", libc.ptrace(0, 0, 0, 0))
attempt("unshare", libc.unshare(0x10000000))
for number in 425, 435, 438, 467, 0x40000000 | 41:
    attempt(number, libc.syscall(ctypes.c_long(number), 0, 0, 0))
pid = os.fork()
if pid == 0:
    os.execv("/bin/true", ["true"])
print("child", os.waitpid(pid, 0)[1])
"""


class FilterTests(SynchronousTestCase):
    def test_calls(self) -> None:
        """X33, CVE-2025-46416: sockets of the Internet only, no way around, and no other harm."""
        code = filter_for(platform.machine())
        require(bool(code), "a machine whose system calls are known", of_kernel=True)
        number = filter._MACHINES[platform.machine()][1]
        seen = subprocess.run(
            [sys.executable, "-c", _TRIES.replace("SOCKET", str(number))],
            check=True, stdout=subprocess.PIPE, text=True,
        ).stdout  # fmt: skip
        results = dict(line.split(None, 1) for line in seen.splitlines())
        allowed = {name: results.pop(name) for name in ("AF_INET", "AF_INET6", "child")}
        self.assertIn(allowed["AF_INET6"], ("done", "EAFNOSUPPORT"))
        self.assertEqual((allowed["AF_INET"], allowed["child"]), ("done", "0"))
        self.assertEqual(results.pop("socketpair"), "done")  # slirp4netns insists on it, but
        self.assertEqual(results.pop("pair"), "-1 -1")
        self.assertEqual(set(results.values()), {"ENOSYS"}, results)
        self.assertEqual(len(results), 12)

    def test_numbers(self) -> None:
        """X33: the numbers of all machines are those that libseccomp knows."""
        try:
            library = ctypes.CDLL("libseccomp.so.2")
        except OSError:
            library = None
        require(library is not None, "libseccomp")
        assert library is not None
        for name, (code, sock, pair, denied) in filter._MACHINES.items():
            audit = ctypes.c_uint32(code)

            def numbers(*calls: str, audit: ctypes.c_uint32 = audit) -> list[int]:
                resolve = library.seccomp_syscall_resolve_name_arch
                found = [resolve(audit, call.encode()) for call in calls]
                return [number for number in found if number >= 0]

            self.assertEqual(sorted(denied), sorted(numbers(*_DENIED)), name)
            self.assertEqual(list(filter._EVERYWHERE), numbers(*_EVERYWHERE), name)
            # Where there is socketcall(2) the library has a number of its own for these.
            own = numbers("socket", "socketpair") or [sock, pair]
            self.assertEqual([sock, pair], own, name)

    def test_unknown_machine(self) -> None:
        """X28: no filter is made up."""
        self.assertEqual(filter_for("vax"), b"")
        self.assertEqual(socket.AF_INET6, filter._FAMILIES[1])
