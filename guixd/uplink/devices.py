"""The network devices of a build, set up in its own network namespace (spec: sandbox §6, §7).

A build that may use the network has a device `tap0`.  What it sends there reaches another
process, slirp4netns, as packets, and that one talks to the machine's network.  Both are
children of the zygote, and connected by a socket until the packets flow.

Each function raises `OSError`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress

LINK = 5
"""Descriptor of the socket between the two processes."""
TAP = 6
"""Descriptor of the device in the process that moves packets."""
ADDRESS, ROUTER, NAME_SERVER = "10.0.2.100", "10.0.2.2", "10.0.2.3"
ADDRESS6, ROUTER6, LOCAL6 = "fd00::80", "fd00::2", "fe80::80"
DEVICE = "/dev/net/tun"

_NAME = "tap0"
_BROADCAST = "10.0.2.255"
_SIOCSIFFLAGS = 0x8914
_TUNSETIFF = 0x800454CA if os.uname().machine.startswith("ppc") else 0x400454CA
_UP, _LOOPBACK, _RUNNING = 1, 8, 0x40
_TAP, _NO_PACKET_INFORMATION = 2, 0x1000


def move(descriptor: int, to: int, *, inheritable: bool = False) -> None:
    """Give DESCRIPTOR the number TO."""
    if descriptor == to:
        os.set_inheritable(to, inheritable)
    else:
        os.dup2(descriptor, to, inheritable)
        os.close(descriptor)


def bring_up_loopback() -> None:
    """Bring `lo` up; the kernel gives it its addresses."""
    # For every build, so the fastest way to do it.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.pack("16sH22x", b"lo", _UP | _LOOPBACK | _RUNNING)
        fcntl.ioctl(control, _SIOCSIFFLAGS, flags)


def offer_tap(ipv6: bool, localnet: bool, patience: float) -> None:
    """Make and set up the device, hand it to the other process, and wait until that is ready.

    :param ipv6: whether the machine has an IPv6 address that others can reach.
    :param localnet: whether 127.0.0.0/8 may be routed, for proxies at such an address.
    :param patience: how many seconds to wait.
    """
    tap = os.open(DEVICE, os.O_RDWR)
    kind = _TAP | _NO_PACKET_INFORMATION
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", _NAME.encode(), kind))
    _set_up(ipv6)
    if localnet:
        _write("/proc/sys/net/ipv4/conf/all/route_localnet", "1")
    try:
        with socket.socket(fileno=LINK) as link:
            link.settimeout(patience)
            socket.send_fds(link, [b"\0"], [tap], socket.MSG_NOSIGNAL)
            ready = link.recv(1)
    except (ConnectionError, TimeoutError):
        ready = b""
    if ready != b"1":
        text = "slirp4netns, of which version 1.3.0 or later is needed, did not become ready"
        raise ConnectionError(errno.ECONNRESET, text)
    os.close(tap)


def take_tap() -> None:
    """Wait for the device, and keep it and the socket for the program that comes next."""
    with socket.socket(fileno=os.dup(LINK)) as link:
        _data, descriptors, _flags, _ = socket.recv_fds(link, 1, 1)
    if not descriptors:
        raise ConnectionError(errno.ECONNRESET, "there is no build any more")
    move(descriptors[0], TAP, inheritable=True)
    os.set_inheritable(LINK, True)


def _set_up(ipv6: bool) -> None:
    """Give the device its addresses and routes."""
    # Few builds need it, and it takes longer to load than all the rest of them.
    from pyroute2 import IPRoute, NetlinkError

    try:
        with IPRoute() as kernel:
            (device,) = kernel.link_lookup(ifname=_NAME)
            kernel.addr("add", index=device, address=ADDRESS, prefixlen=24, broadcast=_BROADCAST)
            with suppress(OSError):  # IPv6 is switched off.
                # Addresses count at once, and nobody else on this net tells which ones there are.
                for name in "accept_dad", "accept_ra":
                    _write(f"/proc/sys/net/ipv6/conf/{_NAME}/{name}", "0")
            kernel.link("set", index=device, state="up")
            kernel.route("add", dst="default", gateway=ROUTER)
            with suppress(NetlinkError):
                for address in (LOCAL6, ADDRESS6) if ipv6 else (LOCAL6,):
                    kernel.addr("add", index=device, address=address, prefixlen=64)
                if ipv6:
                    kernel.route("add", family=socket.AF_INET6, dst="default", gateway=ROUTER6)
                else:
                    # Without an address the machine has no use for packets to anywhere.
                    kernel.route("add", family=socket.AF_INET6, dst=f"{ROUTER6}/128", oif=device)
    except NetlinkError as error:
        raise OSError(error.code, f"{os.strerror(error.code)}, for the device {_NAME}") from error


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
