"""The greeting and the messages around replies, without I/O (spec: protocol §3, §4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from guixd.errors import GuixdError, ProtocolError
from guixd.formats import wire
from guixd.formats.operations import PROTOCOL_MINOR
from guixd.formats.wire import MORE, Data, More, Source, encode_bytes, encode_int, encode_string

CLIENT_MAGIC: Final = 0x6E697863
SERVER_MAGIC: Final = 0x6478696F
VERSION: Final = 0x100 | PROTOCOL_MINOR

NEXT: Final = encode_int(0x6F6C6D67)
READ: Final = encode_int(0x64617461)
WRITE: Final = encode_int(0x64617416)
LAST: Final = encode_int(0x616C7473)
ERROR: Final = encode_int(0x63787470)

STATUS_SINCE: Final = 8
"""Clients below this minor version get errors without a status."""


def encode_next(text: Data) -> bytes:
    """Return a message with log TEXT."""
    return NEXT + encode_bytes(text)


def encode_read(size: int) -> bytes:
    """Return a message that asks the client for 1 to SIZE bytes."""
    return READ + encode_int(size)


def encode_write(data: Data) -> bytes:
    """Return a message with DATA for the client's sink."""
    return WRITE + encode_bytes(data)


def encode_error(text: str, status: int = 1, minor: int = PROTOCOL_MINOR) -> bytes:
    """Return the message that an operation failed, as a client of MINOR gets it."""
    message = ERROR + encode_string(text)
    return message + encode_int(status) if minor >= STATUS_SINCE else message


@dataclass(frozen=True, slots=True)
class Next:
    """Log text, any bytes."""

    text: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """The daemon wants 1 to `size` bytes."""

    size: int


@dataclass(frozen=True, slots=True)
class Write:
    """Data for the client's sink."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Last:
    """The operation succeeded; the reply follows."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The operation failed; nothing follows."""

    text: str
    status: int


Message: TypeAlias = Next | Read | Write | Last | Failed


class MessageReader:
    """Reads messages as a client of some minor version gets them."""

    __slots__ = ("_body", "_plain", "_word")

    def __init__(self, minor: int = PROTOCOL_MINOR) -> None:
        """Read what is for a client of MINOR."""
        self._plain = minor < STATUS_SINCE
        self._word: bytes | None = None
        self._body: wire.Reader[tuple[Any, ...]] | None = None

    def resume(self, source: Source) -> Message | More:
        """Return the next message, or `MORE`.

        :raises ProtocolError: no known message.
        """
        if self._body is None:
            number = source.word()
            if number is MORE:
                return MORE
            self._word = encode_int(number)
            series = (
                _PLAIN_ERROR if self._plain and self._word == ERROR else _BODIES.get(self._word)
            )
            if series is None:
                raise ProtocolError(f"unknown message {number:#x} from the daemon")
            self._body = series.begin()
        values = self._body.resume(source)
        if values is MORE:
            return MORE
        word, self._body = self._word, None
        if word == LAST:
            return Last()
        if word == ERROR:
            return Failed(values[0], 1 if self._plain else values[1])
        if word == READ:
            return Read(values[0])
        return Next(values[0]) if word == NEXT else Write(values[0])


_ERROR_TEXT: Final = wire.String(wire.MAX_TEXT)
_PLAIN_ERROR: Final = wire.Series(_ERROR_TEXT)
_BODIES: Final = {
    NEXT: wire.Series(wire.TEXT),
    READ: wire.Series(wire.INT),
    WRITE: wire.Series(wire.TEXT),
    LAST: wire.Series(),
    ERROR: wire.Series(_ERROR_TEXT, wire.INT),
}


class NotAClient(GuixdError):
    """The peer does not speak the protocol; close without a byte."""

    reason = "not-a-client"


@dataclass(frozen=True, slots=True)
class Greeting:
    """What the client said in the handshake."""

    version: int = VERSION
    cpu: int | None = None
    """The processor to pin the session to."""
    reserve_space: bool = True
    """Whether to keep the reserve file."""

    @property
    def minor(self) -> int:
        """The minor version, on which the form of all messages depends."""
        return self.version & 0xFF

    def encode(self) -> bytes:
        """Return what the client sends, answers not awaited."""
        out = [encode_int(CLIENT_MAGIC), encode_int(self.version)]
        if self.minor >= 14:
            out.append(encode_int(0 if self.cpu is None else 1))
            if self.cpu is not None:
                out.append(encode_int(self.cpu))
        if self.minor >= 11:
            out.append(encode_int(1 if self.reserve_space else 0))
        return b"".join(out)


ANSWER: Final = encode_int(SERVER_MAGIC) + encode_int(VERSION)
"""What the server sends when it has the client's magic number."""


class ServerHandshake:
    """The server's side: `to_send` has bytes for the client after each step."""

    __slots__ = ("_cpu", "_step", "_version", "to_send")

    def __init__(self) -> None:
        self.to_send = b""
        self._step = self._magic
        self._version = 0
        self._cpu: int | None = None

    def resume(self, source: Source) -> Greeting | More:
        """Go on with SOURCE; the greeting when it is whole.

        :raises NotAClient: wrong magic number.
        :raises ProtocolError: a malformed integer.
        """
        while True:
            try:
                word = source.word()
            except ProtocolError as error:
                if self._step == self._magic:
                    raise NotAClient(error.text) from None
                raise
            if word is MORE:
                return MORE
            greeting = self._step(word)
            if greeting is not None:
                return greeting

    @property
    def minor(self) -> int:
        """The client's minor version, 0 as long as it is unknown."""
        return self._version & 0xFF

    def _magic(self, word: int) -> Greeting | None:
        if word != CLIENT_MAGIC:
            raise NotAClient("wrong magic number")
        self.to_send = ANSWER
        self._step = self._got_version
        return None

    def _got_version(self, word: int) -> Greeting | None:
        self._version = word
        if self.minor >= 14:
            self._step = self._affinity
        elif self.minor >= 11:
            self._step = self._reserve
        else:
            return Greeting(word)
        return None

    def _affinity(self, word: int) -> Greeting | None:
        self._step = self._processor if word else self._reserve
        return None

    def _processor(self, word: int) -> Greeting | None:
        self._cpu = word
        self._step = self._reserve
        return None

    def _reserve(self, word: int) -> Greeting | None:
        return Greeting(self._version, self._cpu, word != 0)


class ClientHandshake:
    """The client's side: reads the server's two words; then messages follow."""

    __slots__ = ("_words",)

    def __init__(self) -> None:
        self._words: list[int] = []

    def resume(self, source: Source) -> int | More:
        """Return the server's version.

        :raises ProtocolError: the peer is no daemon, or has another major version.
        """
        while len(self._words) < 2:
            word = source.word()
            if word is MORE:
                return MORE
            self._words.append(word)
            if self._words[0] != SERVER_MAGIC:
                raise ProtocolError("the peer is not a build daemon")
        version = self._words[1]
        if version & 0xFF00 != VERSION & 0xFF00:
            raise ProtocolError(f"the daemon speaks version {version:#x}, not {VERSION:#x}")
        return version
