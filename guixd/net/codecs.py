"""Undoing compression as data comes, in bounded memory (spec: substitutes §7)."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

COMPRESSIONS = ("none", "gzip", "bzip2", "xz", "lzip", "zstd")
BLOCK = 256 << 10
"""Most bytes that come out of a decoder at once."""
_MOST_MEMORY = 256 << 20


class BadData(Exception):
    """What came is not what it should be when uncompressed."""


class Decoder(Protocol):
    """Undoes one compression."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what DATA adds, in pieces of at most `BLOCK` bytes; to be exhausted.

        :raises BadData: it is garbled.
        """
        ...

    def end(self) -> None:
        """Say that nothing more comes.

        :raises BadData: something is missing.
        """
        ...


class _Plain:
    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def end(self) -> None:
        pass


class _Members:
    """Streams one after the other, each undone by a new object of the standard library."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._stream: Any = None
        self._any = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            yield from self._feed(data)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError, MemoryError) as error:
            raise BadData(f"the compressed data is garbled: {error}") from None

    def _feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._stream is None:
                self._stream, self._any = self._make(), True
            stream = self._stream
            block = stream.decompress(data, BLOCK)
            data = b""
            while True:
                if block:
                    yield block
                if stream.eof or (stream.needs_input and not block):
                    break
                block = stream.decompress(b"", BLOCK)
                if not block and not stream.eof:
                    break
            if stream.eof:
                data, self._stream = stream.unused_data, None

    def end(self) -> None:
        if self._stream is not None or not self._any:
            raise BadData("the compressed data is incomplete")


class _Gzip:
    """What `_Members` expects, of `zlib`."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail + data, most)


def _xz() -> Any:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MEMORY)


def decoder(compression: str) -> Decoder:
    """Return a new decoder.

    :param compression: one of `COMPRESSIONS`.
    :raises BadData: it is none of these, or cannot be undone here.
    """
    if compression == "none":
        return _Plain()
    if compression == "gzip":
        return _Members(_Gzip)
    if compression == "bzip2":
        return _Members(bz2.BZ2Decompressor)
    if compression == "xz":
        return _Members(_xz)
    raise BadData(f"compression '{compression}' is not supported here")


def supported() -> tuple[str, ...]:
    """Return the compressions that `decoder` takes on this machine."""
    found = []
    for name in COMPRESSIONS:
        try:
            decoder(name)
        except BadData:
            continue
        found.append(name)
    return tuple(found)
