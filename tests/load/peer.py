"""A client that blocks, and what can be seen of the daemon from outside."""

from __future__ import annotations

import os
import re
import resource
import socket
from pathlib import Path
from typing import Any, TypeVar

from guixd.formats.messages import ClientHandshake, Failed, Greeting, Last, MessageReader
from guixd.formats.operations import Operation, reply_kind
from guixd.formats.path import StoreDirectory
from guixd.formats.wire import MORE, Reader, Source

T = TypeVar("T")
WAIT = 30.0
"""Seconds after which a daemon that does not answer hangs."""


class Ended(Exception):
    """The daemon has closed the connection."""


class Peer:
    """One connection to the daemon.

    :ivar socket: to send what no client would, and to receive nothing.
    """

    def __init__(self, name: str, store: StoreDirectory) -> None:
        """Connect to the socket NAME; nothing is sent yet."""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(WAIT)
        self.socket.connect(name)
        self._source = Source(store)

    def close(self) -> None:
        self.socket.close()

    def greet(self) -> None:
        """Do the handshake."""
        self.socket.sendall(Greeting().encode())
        self.take(ClientHandshake())
        self.expect_last()

    def ask(self, operation: Operation[T]) -> T:
        """Return the reply to OPERATION."""
        self.socket.sendall(operation.encode())
        return self.reply(operation)

    def reply(self, operation: Operation[T]) -> T:
        """Return the reply to OPERATION, which has been sent."""
        self.expect_last()
        kind: Any = reply_kind(operation.opcode)
        result: T = self.take(kind.begin())
        return result

    def expect_last(self) -> None:
        """Take messages up to the one that says that the reply follows."""
        while True:
            match self.take(MessageReader()):
                case Last():
                    return
                case Failed(text):
                    raise AssertionError(text)

    def take(self, reader: Reader[T] | Any) -> T:
        """Receive what READER reads.

        :raises Ended: nothing more comes.
        """
        while True:
            value: Any = reader.resume(self._source)
            if value is not MORE:
                result: T = value
                return result
            data = self.socket.recv(1 << 18)
            if not data:
                raise Ended
            self._source.feed(data)


def memory(pid: int) -> int:
    """Return how many bytes of its own the process PID uses."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(n) << 10 for n in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+)", status, re.M))


def descriptors(pid: int) -> int:
    """Return how many files the process PID has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def allow_descriptors(count: int) -> bool:
    """Let this process open COUNT files, if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count <= hard or (soft < count and hard == resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= count
