"""A blocking client of the worker protocol, as cheap as Python allows.

It is there so that the daemon is what gets measured.  Only what the workloads need;
spec: protocol §2 to §5.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable
from typing import Self

CLIENT_MAGIC, SERVER_MAGIC, VERSION = 0x6E697863, 0x6478696F, 0x164
NEXT, LAST, ERROR = 0x6F6C6D67, 0x616C7473, 0x63787470
READ, WRITE = 0x64617461, 0x64617416

_WORD = struct.Struct("<Q")
word = _WORD.pack


def string(value: str | bytes) -> bytes:
    """Encode a string: length, bytes, zeros up to a multiple of eight."""
    data = value.encode() if isinstance(value, str) else value
    return word(len(data)) + data + bytes(-len(data) % 8)


def strings(values: Iterable[str]) -> bytes:
    """Encode a list of strings."""
    encoded = [string(value) for value in values]
    return word(len(encoded)) + b"".join(encoded)


class Refused(Exception):
    """The daemon answered with an error: its text and status."""


class Client:
    """A greeted connection to the daemon at the socket file PATH."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.on_log: Callable[[bytes], object] = lambda _: None
        self._sink: Callable[[bytes], object] = lambda _: None
        self._source: Callable[[int], bytes] = lambda _: b""
        self._buffer = b""
        self.socket.sendall(word(CLIENT_MAGIC) + word(VERSION) + word(0) + word(1))
        if self._word() != SERVER_MAGIC or self._word() & 0xFF00 != VERSION & 0xFF00:
            raise Refused("not a build daemon")
        self._drain()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            received = self.socket.recv(1 << 17)
            if not received:
                raise EOFError("the daemon closed the connection")
            self._buffer += received
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _word(self) -> int:
        return int(_WORD.unpack(self._take(8))[0])

    def _bytes(self) -> bytes:
        size = self._word()
        return self._take(size + -size % 8)[:size]

    def _strings(self) -> list[str]:
        return [self._bytes().decode() for _ in range(self._word())]

    def _drain(self) -> None:
        """Take messages up to the one that ends the request's work."""
        while (kind := self._word()) != LAST:
            if kind == NEXT:
                self.on_log(self._bytes())
            elif kind == WRITE:
                self._sink(self._bytes())
            elif kind == READ:
                self.socket.sendall(string(self._source(self._word())))
            elif kind == ERROR:
                raise Refused(self._bytes().decode(errors="replace"), self._word())
            else:
                raise Refused(f"unexpected message {kind:#x}")

    def _call(self, operation: int, *arguments: bytes) -> None:
        self.socket.sendall(word(operation) + b"".join(arguments))
        self._drain()

    def exchange(self, requests: Iterable[tuple[bytes, int]]) -> list[bytes]:
        """Send each request and wait for its reply of a size known beforehand.

        The replies are looked at afterwards, by the caller.
        """
        send, receive, replies = self.socket.sendall, self.socket.recv, []
        for request, size in requests:
            send(request)
            reply = receive(size)
            while len(reply) < size:
                more = receive(size - len(reply))
                if not more:
                    raise EOFError(f"the daemon closed the connection after {reply[:200]!r}")
                reply += more
            replies.append(reply)
        return replies

    # requests

    def set_options(
        self, *, jobs: int = 1, trace: bool = False, substitute_urls: str | None = None
    ) -> Self:
        """Ask for JOBS builds at a time and no offloading.

        :param trace: whether lines for programs, `@ build-started` and so on, are wanted.
        :param substitute_urls: where substitutes are; none are wanted without.
        """
        pairs = {"build-max-jobs": str(jobs), "build-cores": "1"}
        if substitute_urls is not None:
            pairs["substitute-urls"] = substitute_urls
        flags = (0, 0, 0, 0, 0, 0, 0, int(trace), int(substitute_urls is not None))
        encoded = [string(name) + string(value) for name, value in pairs.items()]
        self._call(19, *map(word, flags), word(len(pairs)), *encoded)
        return self

    def is_valid(self, path: str) -> bool:
        self._call(1, string(path))
        return self._word() == 1

    def valid_paths(self, paths: list[str]) -> list[str]:
        self._call(31, strings(paths))
        return self._strings()

    def path_info(self, path: str) -> tuple[str, str, list[str], int]:
        """Return deriver, hash, references and size."""
        self._call(26, string(path))
        deriver, digest = self._bytes().decode(), self._bytes().decode()
        references, _, size = self._strings(), self._word(), self._word()
        return deriver, digest, references, size

    def add_text(self, name: str, text: bytes, references: Iterable[str] = ()) -> str:
        self._call(8, string(name), string(text), strings(sorted(references)))
        return self._bytes().decode()

    def add(self, name: str, chunks: Iterable[bytes]) -> str:
        """Add the NAR that CHUNKS make, recursively with sha256."""
        self.socket.sendall(word(7) + string(name) + word(1) + word(1) + string("sha256"))
        for chunk in chunks:
            self.socket.sendall(chunk)
        self._drain()
        return self._bytes().decode()

    def derivation_outputs(self, path: str) -> list[str]:
        self._call(22, string(path))
        return self._strings()

    def optimise(self) -> None:
        self._call(34)
        self._word()

    def verify(self, *, contents: bool) -> bool:
        """Return whether all is well."""
        self._call(35, word(int(contents)), word(0))
        return self._word() == 0

    def build(self, derivations: Iterable[str]) -> None:
        self._call(9, strings(derivations), word(0))
        self._word()

    def ensure(self, path: str) -> None:
        """Make PATH valid, by a substitute."""
        self._call(10, string(path))
        self._word()

    def substitutable(self, paths: list[str]) -> list[str]:
        self._call(32, strings(paths))
        return self._strings()

    def add_indirect_root(self, link: str) -> None:
        self._call(12, string(link))
        self._word()

    def collect(self, action: int, paths: Iterable[str] = ()) -> list[str]:
        """Collect garbage; ACTION is 0 for live, 1 for dead, 2 to delete, 3 to delete PATHS."""
        numbers = (0, 2**64 - 1, 0, 0, 0)
        self._call(20, word(action), strings(paths), *map(word, numbers))
        found = self._strings()
        self._take(16)
        return found

    def export(self, path: str, sink: Callable[[bytes], object], *, sign: bool = False) -> None:
        self._sink = sink
        self._call(16, string(path), word(int(sign)))
        self._word()

    def import_paths(self, archive: bytes) -> list[str]:
        """Import what ARCHIVE, a whole stream, holds."""
        view, position = memoryview(archive), 0

        def source(size: int) -> bytes:
            nonlocal position
            position += size
            return bytes(view[position - size : position])

        self._source = source
        self._call(27)
        return self._strings()


def is_valid_request(path: str) -> tuple[bytes, int]:
    """A request for `Client.exchange`; the reply is LAST and a number."""
    return word(1) + string(path), 16


def path_info_request(path: str, references: Iterable[str] = ()) -> tuple[bytes, int]:
    """A request about a PATH without deriver, and with REFERENCES."""
    size = 8 + 8 + len(string("0" * 64)) + len(strings(references)) + 16
    return word(26) + string(path), size


def valid_paths_request(paths: list[str], valid: list[str]) -> tuple[bytes, int]:
    """A request which of PATHS are valid, as VALID are."""
    return word(31) + strings(paths), 8 + len(strings(valid))


def add_text_request(name: str, text: bytes, store: str) -> tuple[bytes, int]:
    """A request to add TEXT without references to the directory STORE."""
    size = 8 + len(string(f"{store}/{'0' * 32}-{name}"))
    return word(8) + string(name) + string(text) + word(0), size


def outputs_request(derivation: str, outputs: list[str]) -> tuple[bytes, int]:
    """A request for the OUTPUTS of DERIVATION."""
    return word(22) + string(derivation), 8 + len(strings(outputs))
