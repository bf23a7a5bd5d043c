"""What clients might send from the greeting on: right, nearly right, and garbage."""

from __future__ import annotations

import dataclasses
import select
import socket
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from guixd.formats import operations as op
from guixd.formats.messages import Failed, Greeting, Last, MessageReader
from guixd.formats.operations import Operation, reply_kind
from guixd.formats.path import StoreDirectory, StorePath
from guixd.formats.wire import MORE, Source, encode_bytes
from tests.archives import archive, trees
from tests.formats.protocol import instances_of, minors
from tests.load.peer import WAIT

HANDSHAKE = 16
"""Bytes that the daemon sends before its first message."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A request with what follows it."""

    operation: Operation[Any]
    more: bytes = b""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a client says that knows the protocol."""

    greeting: Greeting
    requests: tuple[Request, ...]

    def encode(self, store: StoreDirectory, known: Sequence[StorePath]) -> bytes:
        """Return all that is sent to a daemon that has STORE with the items KNOWN."""
        minor = self.greeting.minor
        parts = [
            moved(request.operation, store, known).encode(minor) + request.more
            for request in self.requests
        ]
        return b"".join([self.greeting.encode(), *parts])


def moved(
    request: Operation[Any], store: StoreDirectory, known: Sequence[StorePath]
) -> Operation[Any]:
    """Return REQUEST with its paths in STORE, some of them KNOWN."""

    def move(value: Any) -> Any:
        if isinstance(value, StorePath):
            base = value.base
            return known[len(base) % len(known)] if len(base) % 3 == 0 else store.child(base)
        if isinstance(value, tuple) and value and isinstance(value[0], StorePath):
            return tuple(sorted({move(path) for path in value}))
        return value

    given: Any = request
    fields = dataclasses.fields(given)
    changes = {field.name: move(getattr(request, field.name)) for field in fields}
    changed: Operation[Any] = dataclasses.replace(given, **changes)
    return changed


# --- right ---------------------------------------------------------------------------


def _greetings(minor: int) -> st.SearchStrategy[Greeting]:
    majors = st.sampled_from((0x100, 0, 0x200, 0xFFFF00))
    processors = st.none() | st.integers(0, 2**32 - 1) if minor >= 14 else st.none()
    return st.builds(Greeting, majors.map(lambda major: major | minor), processors, st.booleans())


def _requests(minor: int) -> st.SearchStrategy[Request]:
    streaming = (op.AddToStore.opcode, op.ImportPaths.opcode)
    plain = st.sampled_from(sorted(set(op.OPERATIONS).difference(streaming))).flatmap(
        lambda opcode: instances_of(op.OPERATIONS[opcode], minor)
    )
    return st.one_of(
        plain.map(Request),
        st.builds(Request, instances_of(op.AddToStore, minor), trees.map(archive)),
    )


conversations: st.SearchStrategy[Conversation] = minors.flatmap(
    lambda minor: st.builds(
        Conversation, _greetings(minor), st.lists(_requests(minor), max_size=6).map(tuple)
    )
)
"""Conversations without a fault, but with paths and names that may not exist."""

# --- wrong ---------------------------------------------------------------------------

_words = st.sampled_from(
    (0, 1, 7, 8, 9, 20, 27, 99, 2**16, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
).map(lambda number: number.to_bytes(8, "little"))
garbage = st.one_of(st.binary(max_size=64), st.lists(_words, max_size=8).map(b"".join))

imports: st.SearchStrategy[Conversation] = st.lists(garbage, max_size=4).map(
    lambda answers: Conversation(
        Greeting(), (Request(op.ImportPaths(), b"".join(map(encode_bytes, [*answers, b""]))),)
    )
)
"""Conversations in which READ messages are answered with garbage."""


@st.composite
def spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    """Return DATA with some faults in it."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        at -= draw(st.sampled_from((0, at % 8)))  # half of them at words
        end = min(len(data), at + draw(st.sampled_from((0, 1, 8, 24))))
        data = data[:at] + draw(garbage) + data[end:]
    return data


# --- speaking --------------------------------------------------------------------------


def exchange(
    connection: socket.socket,
    data: bytes,
    cuts: Sequence[int],
    enough: Callable[[bytes], bool] = lambda answer: True,
) -> bytes:
    """Send DATA, cut at some places, and return what comes back.

    :param enough: whether what came back is all, so that this side ends, too.
    :raises TimeoutError: the daemon neither takes DATA nor answers nor closes.
    """
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[start:end] for start, end in pairwise(bounds)]
    received = bytearray()
    connection.setblocking(False)
    ended = False
    while True:
        if not pieces and not ended and enough(bytes(received)):
            ended = True
            try:
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        ready = select.select([connection], [connection] if pieces else [], [], WAIT)
        if not any(ready):
            raise TimeoutError("the daemon hangs")
        try:
            if ready[1]:
                pieces[0] = pieces[0][connection.send(pieces[0]) :]
                if not pieces[0]:
                    del pieces[0]
            if ready[0]:
                part = connection.recv(1 << 16)
                if not part:
                    return bytes(received)
                received += part
        except BlockingIOError:
            pass
        except OSError:  # it has closed without reading all
            return bytes(received)


def replies(
    answer: bytes, conversation: Conversation, store: StoreDirectory
) -> list[object] | None:
    """Return the replies in ANSWER, `Failed` for errors; None if some are missing.

    :raises AssertionError: it is not what the daemon may say to CONVERSATION.
    """
    source = Source(store)
    source.feed(answer[HANDSHAKE:])
    minor = conversation.greeting.minor
    found: list[object] = []
    for request in (None, *conversation.requests):
        message: Any = None
        while not isinstance(message, Last | Failed):
            message = MessageReader(minor).resume(source)
            if message is MORE:
                return None
        if isinstance(message, Last) and request is not None:
            kind: Any = reply_kind(request.operation.opcode, minor)
            message = kind.begin().resume(source)
            if message is MORE:
                return None
        found.append(message)
    if len(source):
        raise AssertionError(f"{answer!r} has more than replies")
    return found
