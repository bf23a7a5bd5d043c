"""The normalized archive (NAR): a strict push parser and the pieces for writing (spec: nar).

The parser accepts the canonical form only, so that what was received and what
a new serialisation of the restored tree gives are the same bytes.  It compares
whole runs of tokens at once, keeps no more than one entry's header between two
blocks, and passes contents on as views of the caller's block.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

from guixd.errors import BadArchive

_LONG = struct.Struct("<Q")
_ZEROS = bytes(8)


def padding(size: int) -> bytes:
    """Return the zero bytes that follow SIZE bytes."""
    return _ZEROS[: -size & 7]


def token(text: bytes) -> bytes:
    """Return TEXT as a string of the archive: its length, its bytes, zeros."""
    return _LONG.pack(len(text)) + text + _ZEROS[: -len(text) & 7]


def _tokens(*texts: bytes) -> bytes:
    return b"".join(map(token, texts))


MAGIC = token(b"nix-archive-1")
CLOSE = token(b")")
CLOSE_ENTRY = CLOSE + CLOSE
"""Ends the node of an entry and the entry."""
_OPEN = _tokens(b"(", b"type")
_REGULAR = _tokens(b"regular", b"contents")
_EXECUTABLE = _tokens(b"regular", b"executable", b"", b"contents")
_SYMLINK = _tokens(b"symlink", b"target")
_DIRECTORY = token(b"directory")
_BODIES = (_REGULAR, _EXECUTABLE, _SYMLINK, _DIRECTORY)
_ENTRY = _tokens(b"entry", b"(", b"name")
_NODE = token(b"node") + _OPEN
_NODE_REGULAR = _NODE + _REGULAR
_ROOT = MAGIC + _OPEN
_FILE_ENDS = tuple(_ZEROS[:pad] + CLOSE_ENTRY for pad in range(8))

DIRECTORY_HEADER = _OPEN + _DIRECTORY
"""Begins a directory, which `CLOSE` ends."""


def file_header(size: int, executable: bool = False) -> bytes:
    """Return what precedes SIZE bytes of contents; padding and `CLOSE` follow them."""
    return _OPEN + (_EXECUTABLE if executable else _REGULAR) + _LONG.pack(size)


def symlink_node(target: bytes) -> bytes:
    """Return a whole node, a symbolic link to TARGET."""
    return _OPEN + _SYMLINK + token(target) + CLOSE


def entry_header(name: bytes) -> bytes:
    """Return what precedes the node of entry NAME; `CLOSE` follows the node."""
    return _ENTRY + token(name) + _NODE[: -len(_OPEN)]


def nar_of_file(contents: bytes, executable: bool = False) -> bytes:
    """Return the archive of a single regular file."""
    return b"".join(
        (MAGIC, file_header(len(contents), executable), contents, padding(len(contents)), CLOSE)
    )


def file_size(size: int, executable: bool = False) -> int:
    """Return the size of the archive of a file of SIZE bytes."""
    return 112 + (size + 7 & ~7) + 32 * executable


class NarSink(Protocol):
    """Receives the nodes of an archive in its order; the root's NAME is `b""`.

    Names and targets are tested: no slash, NUL, `.`, `..`, nothing twice.
    """

    def directory(self, name: bytes, /) -> None:
        """A directory begins; what follows up to `end_directory` lies in it."""

    def end_directory(self) -> None:
        """The innermost directory is complete."""

    def file(self, name: bytes, executable: bool, size: int, /) -> None:
        """A regular file of SIZE bytes begins."""

    def data(self, view: memoryview, /) -> None:
        """Bytes of the file's contents, to be used before returning; never empty."""

    def end_file(self) -> None:
        """The file is complete."""

    def symlink(self, name: bytes, target: bytes, /) -> None:
        """A symbolic link."""


@dataclass(frozen=True, slots=True)
class NarLimits:
    """Bounds of what is accepted."""

    depth: int = 512
    """Directories within each other."""
    name: int = 255
    """Bytes of a name."""
    target: int = 4095
    """Bytes of a symbolic link's target."""


class _NeedMoreError(Exception):
    """The block ends within a construct, begun at HERE, that is right so far."""

    def __init__(self, here: int) -> None:
        self.here = here


class NarParser:
    """Parses an archive given block by block and tells a `NarSink` what is in it.

    :ivar done: whether the root's last parenthesis was read.
    :ivar consumed: bytes of the archive given so far.
    """

    def __init__(self, sink: NarSink, *, limits: NarLimits | None = None) -> None:
        self.done = False
        self.consumed = 0
        self._sink = sink
        self._limits = limits or NarLimits()
        self._rest = b""
        self._step = self._root
        self._left = 0  # contents of the current file still to come
        self._pad = 0
        self._last = [b""]  # last name in what holds the root, then in each open directory
        self._block = b""
        self._view = memoryview(b"")

    @property
    def contents_left(self) -> int:
        """How many bytes of the current file are still to come, at least."""
        return self._left

    def feed(self, data: bytes | bytearray | memoryview) -> int:
        """Parse DATA and return how many of its bytes belong to the archive.

        That is all of them, until the archive ends within DATA.  What the sink
        raises comes through; the parser cannot go on after any error.

        :raises BadArchive: the bytes are no canonical archive.
        """
        length = len(data)
        if self.done or not length:
            return 0
        position = 0
        if self._left:
            position = self._pass_contents(data)
            if position == length:
                self.consumed += length
                return length
        start = position - len(self._rest)  # where the block begins in DATA
        block = self._rest + bytes(data[position:] if position else data)
        self._block, self._view = block, memoryview(block)
        here, end = 0, len(block)
        try:
            while here < end and not self.done:
                here = self._step(here)
        except _NeedMoreError as need:
            here = need.here
        except BadArchive as error:
            where = self.consumed + start + here
            raise BadArchive(f"bad archive: {error.text} (after byte {where})") from None
        finally:
            self._view.release()
            self._block, self._view = b"", memoryview(b"")
        self._rest = b"" if self.done else block[here:]
        used = start + here if self.done else length
        self.consumed += used
        return used

    def finish(self) -> None:
        """Tell that no more bytes come.

        :raises BadArchive: the archive is not complete.
        """
        if not self.done:
            raise BadArchive(f"bad archive: it ends too early (after byte {self.consumed})")

    def _pass_contents(self, data: bytes | bytearray | memoryview) -> int:
        """Pass on contents without a copy of the block; return how many bytes."""
        size = min(self._left, len(data))
        with memoryview(data) as view, view[:size] as part:
            self._sink.data(part)
        self._left -= size
        if not self._left:
            self._step = self._end_of_file
        return size

    # The steps: each reads one construct of the block at HERE and returns where
    # it ends, or raises _NeedMoreError having told the sink nothing of it.

    def _root(self, here: int) -> int:
        block = self._block
        if not block.startswith(_ROOT, here):
            if not MAGIC.startswith(block[: len(MAGIC)]):
                raise BadArchive("this is not a normalized archive")
            raise self._mismatch(here, here, _ROOT)
        return self._body(here, here + len(_ROOT), b"")

    def _entries(self, here: int) -> int:
        """Read whole entries, up to one that is more than a small regular file."""
        block, view, sink = self._block, self._view, self._sink
        end_of_block, last_name, longest = len(block), self._last[-1], self._limits.name
        while block.startswith(_ENTRY, here):
            at = here + 56
            if at > end_of_block:
                break
            (size,) = _LONG.unpack_from(block, at - 8)
            if not 0 < size <= longest:
                raise BadArchive("a name that is empty or too long")
            end = at + size
            pad = -size & 7
            name = block[at:end]
            at = end + pad
            if at > end_of_block:
                break
            if pad and block[end:at] != _ZEROS[:pad]:
                raise BadArchive("padding that is not zero after a name")
            if b"/" in name or 0 in name or name == b"." or name == b"..":
                raise BadArchive(f"invalid name {name!r}")
            if name <= last_name:
                raise BadArchive(f"name {name!r} is there twice or out of order")
            if not block.startswith(_NODE_REGULAR, at):
                if not block.startswith(_NODE, at):
                    raise self._mismatch(here, at, _NODE)
                return self._body(here, at + len(_NODE), name)
            at += 88
            if at > end_of_block:
                break
            (size,) = _LONG.unpack_from(block, at - 8)
            end = at + size
            pad = -size & 7
            if end + pad + 32 > end_of_block:
                return self._body(here, at - 40, name)
            if block[end : end + pad + 32] != _FILE_ENDS[pad]:
                raise BadArchive("padding that is not zero or a field after the contents")
            sink.file(name, False, size)
            if size:
                sink.data(view[at:end])
            sink.end_file()
            here = end + pad + 32
            self._last[-1] = last_name = name
        else:
            return self._end_of_directory(here)
        raise _NeedMoreError(here)

    def _end_of_directory(self, here: int) -> int:
        closing = self._closing(1)
        if not self._block.startswith(closing, here):
            raise self._mismatch(here, here, _ENTRY, closing)
        self._last.pop()
        self._sink.end_directory()
        self._node_done()
        return here + len(closing)

    def _body(self, here: int, at: int, name: bytes) -> int:
        """Read what follows the word "type" of node NAME."""
        block, last = self._block, self._last
        if block.startswith(_DIRECTORY, at):
            if len(last) > self._limits.depth:
                raise BadArchive("directories are nested too deeply")
            last[-1] = name
            self._sink.directory(name)
            last.append(b"")
            self._step = self._entries
            return at + len(_DIRECTORY)
        if block.startswith(_SYMLINK, at):
            target = self._target(here, at + len(_SYMLINK))
            at += len(_SYMLINK) + 8 + (len(target) + 7 & ~7)
            closing = self._closing(0)
            if not block.startswith(closing, at):
                raise self._mismatch(here, at, closing)
            last[-1] = name
            self._sink.symlink(name, target)
            self._node_done()
            return at + len(closing)
        executable = block.startswith(_EXECUTABLE, at)
        if executable:
            at += len(_EXECUTABLE)
        elif block.startswith(_REGULAR, at):
            at += len(_REGULAR)
        else:
            raise self._mismatch(here, at, *_BODIES)
        if at + 8 > len(block):
            raise _NeedMoreError(here)
        (size,) = _LONG.unpack_from(block, at)
        if size >> 63:
            raise BadArchive("a file of an impossible size")
        last[-1] = name
        self._sink.file(name, executable, size)
        self._left, self._pad = size, -size & 7
        self._step = self._contents if size else self._end_of_file
        return at + 8

    def _contents(self, here: int) -> int:
        end = min(here + self._left, len(self._block))
        self._left -= end - here
        self._sink.data(self._view[here:end])
        if not self._left:
            self._step = self._end_of_file
        return end

    def _end_of_file(self, here: int) -> int:
        expected = _ZEROS[: self._pad] + self._closing(0)
        if not self._block.startswith(expected, here):
            raise self._mismatch(here, here, expected)
        self._sink.end_file()
        self._node_done()
        return here + len(expected)

    def _target(self, here: int, at: int) -> bytes:
        """Return the string at AT, the target of a symbolic link."""
        block = self._block
        if at + 8 > len(block):
            raise _NeedMoreError(here)
        (size,) = _LONG.unpack_from(block, at)
        if not 0 < size <= self._limits.target:
            raise BadArchive("a link target that is empty or too long")
        end = at + 8 + size
        pad = -size & 7
        if end + pad > len(block):
            raise _NeedMoreError(here)
        if block[end : end + pad] != _ZEROS[:pad]:
            raise BadArchive("padding that is not zero after a link target")
        target = block[at + 8 : end]
        if 0 in target:
            raise BadArchive("a link target with a NUL byte")
        return target

    def _closing(self, within: int) -> bytes:
        """Return what ends a node: of an entry, or the root; WITHIN is 1 in a directory."""
        return CLOSE_ENTRY if len(self._last) > 1 + within else CLOSE

    def _node_done(self) -> None:
        self._step = self._entries
        self.done = len(self._last) == 1

    def _mismatch(self, here: int, at: int, *expected: bytes) -> Exception:
        """Return the error of what stands at AT; or that one of EXPECTED may yet come."""
        tail = self._block[at : at + 64]
        if any(len(tail) < len(one) and one.startswith(tail) for one in expected):
            return _NeedMoreError(here)
        return BadArchive("unexpected field, type, order or padding")
