"""Undoing compression as data comes, in bounded memory (spec: substitutes §7)."""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Protocol


def _load_zstd() -> Any:
    try:
        return import_module("backports.zstd")
    except ImportError:
        return None


zstd = _load_zstd()

COMPRESSIONS = ("none", "gzip", "bzip2", "xz", "lzip", "zstd")
BLOCK = 256 << 10
"""Most bytes that come out of a decoder at once."""
_MOST_MEMORY = 256 << 20
_ZSTD_WINDOW = 27
"""Logarithm of the largest window, as that of the `zstd` program."""
_LZIP_HEAD, _LZIP_TAIL = 6, 20
_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    lzma.LZMAError,
    zlib.error,
    ValueError,
    MemoryError,
    *(() if zstd is None else (zstd.ZstdError,)),
)
"""What decoders raise when they get garbage."""


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
        except _ERRORS as error:
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


class _Lzip:
    """One member of an lzip file, likewise."""

    def __init__(self) -> None:
        self._start = b""
        self._stream: Any = None
        self._crc = self._size = self._taken = 0
        self._end = b""
        self.eof = False
        self.unused_data = b""

    @property
    def needs_input(self) -> bool:
        return self._stream is None or self._stream.eof or self._stream.needs_input

    def decompress(self, data: bytes, most: int) -> bytes:
        if self._stream is None:
            self._start += data
            if len(self._start) < _LZIP_HEAD:
                return b""
            self._stream = _lzip_stream(self._start[:_LZIP_HEAD])
            data = self._start[_LZIP_HEAD:]
        if self._stream.eof:
            self._finish(data)
            return b""
        block: bytes = self._stream.decompress(data, most)
        self._crc = zlib.crc32(block, self._crc)
        self._size += len(block)
        if self._stream.eof:
            self._finish(self._stream.unused_data)
        return block

    def _finish(self, data: bytes) -> None:
        self._end += data
        if len(self._end) < _LZIP_TAIL:
            return
        crc, size = struct.unpack("<IQ", self._end[:12])
        if (crc, size) != (self._crc, self._size):
            raise ValueError("wrong checksum")
        self.eof, self.unused_data = True, self._end[_LZIP_TAIL:]


def _lzip_stream(head: bytes) -> lzma.LZMADecompressor:
    if head[:5] != b"LZIP\1":
        raise ValueError("not in lzip's format")
    base = 1 << (head[5] & 0x1F)
    size = base - (base >> 4) * (head[5] >> 5)
    if not 1 << 12 <= size <= _MOST_MEMORY:
        raise ValueError("the dictionary is too large")
    lzma1 = {"id": lzma.FILTER_LZMA1, "dict_size": size, "lc": 3, "lp": 0, "pb": 2}
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[lzma1])


def _zstd() -> Any:
    assert zstd is not None
    limit = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW}
    return zstd.ZstdDecompressor(options=limit)


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
    if compression == "lzip":
        return _Members(_Lzip)
    if compression == "zstd" and zstd is not None:
        return _Members(_zstd)
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
