"""Reading HTTP/1.1 responses to GET requests, without input and output (RFC 9112).

Everything in them is hostile: heads and lines have limits, contradictions are errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

LONGEST_HEAD = 64 << 10
LONGEST_LINE = 4 << 10
"""Of a chunk's size with its extensions."""
MOST_INTERIM = 16
"""How many 1xx responses may come before the real one."""
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\r\n\0]*))?\Z")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*\Z")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?\Z")


class BadResponse(Exception):
    """What came is no HTTP/1.1 response."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The status and the fields of a response, with names in lower case.

    :ivar size: of the body in bytes; `None` if only its end tells.
    :ivar persistent: whether another response may follow on the connection.
    """

    status: int
    phrase: str
    fields: dict[str, str]
    size: int | None
    persistent: bool

    def get(self, name: str) -> str:
        """Return the field NAME, several ones joined by commas; empty if there is none."""
        return self.fields.get(name, "")


class Handler(Protocol):
    """Who is told of a response."""

    def head(self, head: ResponseHead) -> None: ...
    def data(self, data: bytes) -> None: ...
    def end(self) -> None: ...


class _State(Enum):
    HEAD = auto()
    SIZED = auto()
    CHUNK_SIZE = auto()
    CHUNK = auto()
    CHUNK_END = auto()
    TRAILER = auto()
    UNTIL_CLOSED = auto()


class ResponseReader:
    """Splits what comes over a connection into responses, and tells HANDLER.

    After an error nothing more may be fed.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._buffer = bytearray()
        self._state = _State.HEAD
        self._left = 0
        self._interim = 0
        self._trailer = 0
        self._pieces: list[bytes] = []

    @property
    def idle(self) -> bool:
        """Whether nothing of a response has come that has not ended."""
        return self._state is _State.HEAD and not self._buffer and not self._interim

    def feed(self, data: bytes) -> None:
        """Take DATA.

        :raises BadResponse: it cannot be understood.
        """
        if not self._buffer and self._state in (_State.SIZED, _State.CHUNK, _State.UNTIL_CLOSED):
            if self._state is _State.UNTIL_CLOSED:
                self._handler.data(data)
                return
            if len(data) < self._left:
                self._left -= len(data)
                self._handler.data(data)
                return
        self._buffer += data
        try:
            while self._buffer and self._step():
                pass
        finally:
            self._tell()

    def closed(self) -> bool:
        """Say that nothing more comes; return whether that was in order."""
        if self._state is _State.UNTIL_CLOSED:
            self._state = _State.HEAD
            self._handler.end()
            return True
        return self.idle

    def _step(self) -> bool:
        """Take one thing from the buffer; False if more must come first."""
        state = self._state
        if state is _State.HEAD:
            return self._read_head()
        if state in (_State.SIZED, _State.CHUNK):
            part = bytes(self._buffer[: self._left])
            del self._buffer[: self._left]
            self._left -= len(part)
            self._pieces.append(part)
            if self._left == 0:
                if state is _State.SIZED:
                    self._end()
                else:
                    self._state = _State.CHUNK_END
            return True
        if state is _State.UNTIL_CLOSED:
            part = bytes(self._buffer)
            self._buffer.clear()
            self._handler.data(part)
            return True
        line = self._line()
        if line is None:
            return False
        if state is _State.CHUNK_SIZE:
            self._begin_chunk(line)
        elif state is _State.CHUNK_END:
            if line:
                raise BadResponse("a chunk is longer than it should be")
            self._state = _State.CHUNK_SIZE
        else:
            self._trailer += len(line)
            if self._trailer > LONGEST_HEAD:
                raise BadResponse("the trailer is too long")
            if not line:
                self._end()
        return True

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\n", 0, LONGEST_LINE)
        if end < 0:
            if len(self._buffer) >= LONGEST_LINE:
                raise BadResponse("a line is too long")
            return None
        line = bytes(self._buffer[:end]).removesuffix(b"\r")
        del self._buffer[: end + 1]
        return line

    def _begin_chunk(self, line: bytes) -> None:
        match = _SIZE.match(line)
        if match is None:
            raise BadResponse("a chunk has no size")
        self._left = int(match[1], 16)
        self._trailer = 0
        self._state = _State.CHUNK if self._left else _State.TRAILER

    def _tell(self) -> None:
        """Pass on what has come of a body, be it of a thousand chunks, at once."""
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._handler.data(b"".join(pieces))

    def _end(self) -> None:
        self._tell()
        self._state = _State.HEAD
        self._handler.end()

    def _read_head(self) -> bool:
        ends = [
            (position, len(mark))
            for mark in (b"\r\n\r\n", b"\n\n")
            if (position := self._buffer.find(mark, 0, LONGEST_HEAD)) >= 0
        ]
        if not ends:
            if len(self._buffer) >= LONGEST_HEAD:
                raise BadResponse("the head of the answer is too long")
            return False
        position, length = min(ends)
        text = bytes(self._buffer[:position])
        del self._buffer[: position + length]
        head = parse_head(text)
        if head.status < 200:
            self._interim += 1
            if head.status == 101 or self._interim > MOST_INTERIM:
                raise BadResponse("too many answers before the real one")
            return True
        self._interim = 0
        chunked = head.size is None and head.get("transfer-encoding") != ""
        if head.size:
            self._state, self._left = _State.SIZED, head.size
        elif chunked:
            self._state = _State.CHUNK_SIZE
        elif head.size is None:
            self._state = _State.UNTIL_CLOSED
        self._handler.head(head)
        if head.size == 0:
            self._end()
        return True


def parse_head(text: bytes) -> ResponseHead:
    """Read the head of a response, without the empty line at its end.

    :raises BadResponse: it is none.
    """
    first, *lines = re.split(rb"\r?\n", text)
    match = _STATUS.match(first)
    if match is None:
        raise BadResponse("this is not an answer of HTTP/1.1")
    status = int(match[2])
    fields: dict[str, str] = {}
    for line in lines:
        field = _FIELD.match(line)
        if field is None:
            raise BadResponse("a field of the answer's head is not well-formed")
        name, value = field[1].decode("ascii").lower(), field[2].decode("latin-1")
        if name == "content-length" and fields.get(name, value) != value:
            raise BadResponse("the answer has two lengths")
        if name in fields and name != "content-length":
            value = f"{fields[name]}, {value}"
        fields[name] = value
    encoding = fields.get("transfer-encoding", "").lower()
    if encoding not in ("", "chunked"):
        raise BadResponse(f"the transfer encoding '{encoding}' is unknown")
    size: int | None = None
    length = fields.get("content-length")
    if status < 200 or status in (204, 304):
        size = 0
    elif length is not None and not encoding:
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            raise BadResponse("the length of the answer is not a number")
        size = int(length)
    words = {word.strip().lower() for word in fields.get("connection", "").split(",")}
    persistent = (
        (match[1] == b"1" or "keep-alive" in words)
        and "close" not in words
        and (size is not None or bool(encoding))
        and not (length is not None and encoding)
    )
    phrase = (match[3] or b"").decode("latin-1")
    return ResponseHead(status, phrase, fields, size, persistent)
