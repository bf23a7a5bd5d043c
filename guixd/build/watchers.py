"""What clients are told of a substitution: traces, or lines for people (spec: substitutes §9)."""

from __future__ import annotations

from dataclasses import dataclass

from guixd.build.broadcast import Observer
from guixd.build.request import Level

PROGRESS = 0.2
"""Seconds between two traces of progress."""
SLOW_PROGRESS = 5.0
"""Seconds between two lines for people."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    :ivar line: for programs; `None` if they need not know.
    :ivar text: for people; empty if they need not know.
    :ivar download: whether LINE is for those only who follow downloads, who do not
        get TEXT; otherwise both are for everybody.
    """

    line: str | None = None
    text: str = ""
    download: bool = False


class Watcher:
    """A client's view of one substitution.

    :param extended: whether the client follows downloads by their traces.
    """

    def __init__(self, observer: Observer, *, extended: bool) -> None:
        self._observer = observer
        self._extended = extended
        self._last = float("-inf")

    def tell(self, event: Event) -> None:
        """Pass EVENT on."""
        observer, follows = self._observer, self._extended or not event.download
        if event.text and (not event.download or not self._extended):
            observer.log(Level.ERROR, event.text)
        if event.line is not None and follows:
            observer.trace(event.line)

    def progress(self, now: float, line: str, text: str) -> None:
        """Pass on how far a download is at the time NOW; a slow client gets less of it."""
        least = PROGRESS if self._extended else SLOW_PROGRESS
        if self._last == float("-inf") and not self._extended:
            self._last = now  # short downloads need no more than two lines
        if now - self._last < least or self._observer.full() is not None:
            return
        self._last = now
        self.tell(Event(line, text, download=True))
