"""The log as one client sees it (spec: protocol §6, §9).

Everything becomes NEXT messages, which may be sent in the work phase of an
operation only; what comes at other times is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from twisted.internet.defer import Deferred
from zope.interface import implementer

from guixd.build.request import Level
from guixd.formats.trace import build_log
from guixd.interfaces import IBuildObserver
from guixd.service.clientoptions import SessionOptions

ESCAPES = 1
"""The log type in which lines are marked with their level."""
CHUNK = 32 * 1024
"""Most bytes of builder output in one message."""
MOST_PENDING = 128 * 1024
"""How many bytes may wait for the client before builders should wait, too."""


class Messages(Protocol):
    """Where NEXT messages go: the connection."""

    @property
    def pending(self) -> int:
        """How many bytes wait for the client to read."""

    async def drained(self) -> None:
        """Wait until few bytes are pending."""

    def next(self, data: bytes) -> None:
        """Send DATA as one NEXT message, or keep it until it can be sent."""


def whole_characters(data: bytes) -> int:
    """Return how many bytes of DATA do not belong to an unfinished UTF-8 character."""
    size = len(data)
    for back in range(1, min(3, size) + 1):
        byte = data[size - back]
        if 0xC2 <= byte <= 0xF4:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return size - back if length > back else size
        if not 0x80 <= byte < 0xC0:
            break
    return size


@implementer(IBuildObserver)
class ClientLog:
    """Sends log lines, traces and builder output to a client.

    :ivar working: whether an operation is in its work phase.
    """

    def __init__(self, messages: Messages, options: SessionOptions) -> None:
        self._messages = messages
        self._options = options
        self._unfinished: dict[int, bytes] = {}
        self.working = False

    def log(self, level: int, text: str) -> None:
        """Send the lines of TEXT if the client wants to see LEVEL."""
        options = self._options
        if not self.working or level > options.verbosity:
            return
        self._flush()
        marked = options.log_type == ESCAPES and level != Level.INFO
        for line in text.split("\n"):
            # Lines for programs stay as they are, or programs would miss them.
            if marked and not line.startswith("@ "):
                line = f"\x1b[{level}s{line}"
            self._messages.next(line.encode("utf-8", "surrogateescape") + b"\n")

    def trace(self, line: str, instead: str = "") -> None:
        """Send a line for programs if the client wants them, else INSTEAD if there is any."""
        if self.working and self._options.print_trace:
            self._flush()
            self._messages.next(line.encode("utf-8", "surrogateescape") + b"\n")
        elif instead:
            self.log(Level.ERROR, instead)

    def output(self, pid: int, chunk: bytes) -> None:
        """Send what the builder PID wrote, cut between characters."""
        options = self._options
        if not self.working or options.verbosity < options.build_verbosity:
            return
        data = self._unfinished.pop(pid, b"") + chunk
        while len(data) > CHUNK:
            size = whole_characters(data[:CHUNK])
            self._output(pid, data[:size])
            data = data[size:]
        size = whole_characters(data)
        if size < len(data):
            self._unfinished[pid] = data[size:]
        if size:
            self._output(pid, data[:size])

    def last_words(self, lines: Sequence[str], file: str) -> None:
        """Send the end of a failed build's log and the name of its FILE.

        Not to who has it on its screen: a client that tells the logs of builds apart may
        show none of them, and one that gets traces has read the name.
        """
        options = self._options
        shows = options.verbosity >= options.build_verbosity and not options.multiplexed
        if lines and not shows:
            self.log(Level.ERROR, "\n  > ".join(["the last lines of its log:", *lines]))
        if file and not options.print_trace:
            self.log(Level.ERROR, f"the whole log is in `{file}'")

    def full(self) -> Deferred[None] | None:
        """Return None, or what fires when the client has read enough to take more."""
        if self._messages.pending < MOST_PENDING:
            return None
        return Deferred.fromCoroutine(self._messages.drained())

    def finish(self) -> None:
        """Send what is left at the end of an operation."""
        self._flush()
        self.working = False

    def _output(self, pid: int, data: bytes) -> None:
        if self._options.multiplexed:
            data = build_log(pid, data)
        self._messages.next(data)

    def _flush(self) -> None:
        """Send unfinished characters, before something else."""
        while self._unfinished:
            self._output(*self._unfinished.popitem())
