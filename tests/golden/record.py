"""Record what a client and a daemon say to each other.

    python tests/golden/record.py DAEMON-SOCKET LISTEN-SOCKET

listens, passes everything on to the daemon, and writes one file for each
connection next to this script, in the order of `NAMES`; then ends.  Each file
has lines of `>` (from the client) or `<` (from the daemon) and hexadecimal
digits.  `requests.scm` is the client's side: with a stock daemon 1.5.0 and its
client that have /gnu/store and /var/guix for themselves,

    guix-daemon --disable-chroot --no-substitutes &
    GUIX_DAEMON_SOCKET=LISTEN-SOCKET guix repl -- tests/golden/requests.scm

Process ids and times are kept as they came.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
from pathlib import Path

NAMES = (
    "handshake",
    "set-options",
    "add-text",
    "add-flat",
    "add-recursive",
    "is-valid",
    "queries",
    "not-valid",
    "build-works",
    "build-fails",
    "collect",
)
HERE = Path(__file__).parent
WIDTH = 40


def record(client: socket.socket, daemon: socket.socket) -> list[tuple[str, bytearray]]:
    """Pass on what CLIENT and DAEMON send until one has ended; return all of it in order."""
    talk: list[tuple[str, bytearray]] = []
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ, (">", daemon))
        selector.register(daemon, selectors.EVENT_READ, ("<", client))
        while True:
            for key, _ in selector.select():
                side, other = key.data
                source = key.fileobj
                assert isinstance(source, socket.socket)
                data = source.recv(65536)
                if not data:
                    return talk
                if not talk or talk[-1][0] != side:
                    talk.append((side, bytearray()))
                talk[-1][1].extend(data)
                other.sendall(data)


def save(path: Path, talk: list[tuple[str, bytearray]]) -> None:
    """Write TALK to PATH."""
    with path.open("w", encoding="ascii") as file:
        for side, data in talk:
            for start in range(0, len(data), WIDTH):
                file.write(f"{side} {data[start : start + WIDTH].hex()}\n")
                side = " "


def load(name: str) -> list[tuple[str, bytes]]:
    """Read the recording NAME back."""
    talk: list[tuple[str, bytes]] = []
    for line in (HERE / f"{name}.txt").read_text(encoding="ascii").splitlines():
        if line[0] == " ":
            side, data = talk.pop()
        else:
            side, data = line[0], b""
        talk.append((side, data + bytes.fromhex(line[2:])))
    return talk


def main(upstream: str, listen: str) -> None:
    """Record the connections of one run of the requests."""
    if os.path.exists(listen):
        os.unlink(listen)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(listen)
        os.chmod(listen, 0o666)
        server.listen()
        for name in NAMES:
            client, _ = server.accept()
            with client, socket.socket(socket.AF_UNIX) as daemon:
                daemon.connect(upstream)
                save(HERE / f"{name}.txt", record(client, daemon))
    os.unlink(listen)


if __name__ == "__main__":
    main(*sys.argv[1:])
