"""A program that announces services by multicast DNS, well-behaved ones or not.

Arguments: its address, then each service as NAME=ADDRESS,...:PORT.  With `--raw` first, it
sends single packets without a protocol, which is how to announce nonsense.  At all ports
something listens.  It goes on until the end of its input, and then takes all back.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys

from zeroconf import IPVersion, ServiceInfo
from zeroconf.asyncio import AsyncZeroconf

TYPE = "_guix_publish._tcp.local."
_LABELS = (b"_guix_publish", b"_tcp", b"local")
_GROUP = ("224.0.0.251", 5353)


def services(arguments: list[str]) -> list[tuple[str, list[str], int]]:
    found = []
    for argument in arguments:
        name, _, place = argument.rpartition("=")
        addresses, _, port = place.rpartition(":")
        found.append((name, addresses.split(","), int(port)))
    return found


def listen(arguments: list[str]) -> list[socket.socket]:
    """Let something listen at the ports of the services, if nothing does."""
    listening = []
    for port in {port for _, _, port in services(arguments)} - {0}:
        with contextlib.suppress(OSError):
            listening.append(socket.create_server(("", port)))
    return listening


async def announce(own: str, arguments: list[str]) -> None:
    listening = listen(arguments)
    zeroconf = AsyncZeroconf([own], ip_version=IPVersion.V4Only)
    for name, addresses, port in services(arguments):
        packed = [socket.inet_aton(address) for address in addresses]
        info = ServiceInfo(TYPE, f"{name}.{TYPE}", port, addresses=packed, server=f"{name}.local.")
        await zeroconf.async_register_service(info, strict=False)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await zeroconf.async_unregister_all_services()
    await zeroconf.async_close()
    for server in listening:
        server.close()


def _name(*labels: bytes) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def _record(name: bytes, kind: int, data: bytes) -> bytes:
    return name + struct.pack(">HHIH", kind, 1, 4500, len(data)) + data


def packet(label: bytes, addresses: list[str], port: int) -> bytes:
    """Return an answer with all that there is to know of a service."""
    kind, name = _name(*_LABELS), _name(label, *_LABELS)
    host = _name(label[:20], b"local")
    records = [
        _record(kind, 12, name),
        _record(name, 33, struct.pack(">HHH", 0, 0, port) + host),
        _record(name, 16, b"\0"),
        *(_record(host, 1, socket.inet_aton(address)) for address in addresses),
    ]
    return struct.pack(">HHHHHH", 0, 0x8400, 0, len(records), 0, 0) + b"".join(records)


def announce_nonsense(own: str, arguments: list[str]) -> None:
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own))
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sender.bind((own, 5353))
    listening = listen(arguments)
    good = packet(b"cut", [own], 1)
    loop = struct.pack(">HHHHHH", 0, 0x8400, 0, 1, 0, 0) + b"\xc0\x0c" + b"\0" * 10
    for data in (b"", b"\0" * 12, b"\xff" * 1400, loop, *(good[:n] for n in range(12, len(good)))):
        sender.sendto(data, _GROUP)
    for name, addresses, port in services(arguments):
        sender.sendto(packet(name.encode(), addresses, port), _GROUP)
    sys.stdin.read()
    for server in listening:
        server.close()


if __name__ == "__main__":
    if sys.argv[1] == "--raw":
        announce_nonsense(sys.argv[2], sys.argv[3:])
    else:
        asyncio.run(announce(sys.argv[1], sys.argv[2:]))
