"""What is asked of the fetcher, and what it answers: frozen values (spec: downloads §4).

Sizes are in bytes and times in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

SCHEMES = ("http", "https", "ftp")
RESUMPTIONS = 5
"""How often a transfer had best go on where it broke off."""
LEAST = 1 << 10
"""Bytes of a body that had best come in the time in which something must."""
LONGEST_BODY = 1 << 20
"""Of the answer to a lookup."""
AGENT = "GNU Guile"
"""What the client calls itself; servers know it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One body to fetch."""

    url: str
    """May have user information, which becomes Basic credentials."""
    offset: int = 0
    """Leave so many bytes out, if the server can."""
    validator: str = ""
    """With an offset: the `Head.validator` of what was had before; if it is another
    now, all is sent."""
    verify: bool = True
    """Whether TLS certificates must be right.  Without, no credentials are sent by TLS."""
    compression: str = "none"
    """What to undo, see `codecs`; sizes and progress are of the compressed bytes."""
    limit: int | None = None
    """Most bytes to be written."""
    exact: bool = False
    """Whether so many are all of a body that would only end with the connection: some
    servers leave it open.  Not with a compression."""
    schemes: Sequence[str] = SCHEMES
    """What the URL and redirections may be."""
    redirects: int = 20
    """Most redirections to follow."""
    connect_timeout: float = 10.0
    """For each address."""
    idle_timeout: float = 60.0
    """Until the next byte must have come."""
    least: int = 0
    """Fewer bytes in that time are as bad as none."""
    resumptions: int = 0
    """How often to go on where a body broke off, if it is known to be the same."""
    headers: Sequence[tuple[str, str]] = ()
    method: str = "GET"
    """Or `POST`, with nothing in it, which is not redirected."""
    nearest: int = 0
    """The `Reach` that the server must not be nearer than."""

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Request:
        """Read back what `as_json` returned."""
        return cls(**value)


@dataclass(frozen=True, slots=True)
class Head:
    """What is known when a body begins."""

    url: str
    """After all redirections, without user information."""
    size: int | None
    """Of the whole compressed body, with what was left out."""
    offset: int
    """How many bytes are left out: 0 or what was asked for."""
    validator: str
    """A strong `ETag` or a `Last-Modified` date, for `Request.validator`; may be empty."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A body that is complete."""

    head: Head
    received: int
    """Compressed bytes, without those left out."""
    written: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer to a lookup."""

    status: int
    """0 if there was none; then `body` says why."""
    body: bytes
    max_age: int | None
    """From `Cache-Control`, in seconds."""
    kind: str = ""
    """Without an answer: see `FetchError.kind`."""
    baking: bool = False
    """Whether the server is preparing it (`X-Baking: 1`)."""
