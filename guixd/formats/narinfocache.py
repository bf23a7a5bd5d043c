"""The files in which answers of substitute servers are kept (spec: substitutes §6)."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass

LATEST = 2
"""The version of the format."""
_STRING = r'"([^"\\]*(?:\\.[^"\\]*)*)"'
_ENTRY = re.compile(
    r"\s*\(narinfo\s+\(version\s+(?P<version>[0-9]{1,9})\)"
    rf"\s*\(cache-uri\s+{_STRING.replace('(', '(?P<uri>', 1)}\)"
    r"\s*\(date\s+(?P<date>[0-9]{1,18})\)"
    r"\s*\(ttl\s+(?P<ttl>[0-9]{1,18})\)"
    rf"\s*\(value\s+(?:#f|{_STRING.replace('(', '(?P<value>', 1)})\)\)\s*",
    re.ASCII | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{1,6};|.)", re.DOTALL)
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "0": "\0"}


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """An answer that is kept.

    :ivar uri: the server, as configured.
    :ivar date: when it was given, in seconds since the epoch; it holds for `ttl` seconds.
    :ivar value: the narinfo, `None` if there is none.
    """

    uri: str
    date: int
    ttl: int
    value: bytes | None

    @property
    def expiry(self) -> int:
        """From when on it does not hold any more, in seconds since the epoch."""
        return self.date + self.ttl


def directory_name(uri: str) -> str:
    """Return the name of the directory for the server URI."""
    digest = hashlib.sha256(uri.encode("utf-8", "surrogateescape")).digest()
    return base64.b32encode(digest).decode().rstrip("=").lower()


def parse(data: bytes) -> CacheEntry | None:
    """Read a file; `None` if it is of another version, or garbage."""
    try:
        match = _ENTRY.fullmatch(data.decode())
    except UnicodeDecodeError:
        return None
    if match is None or int(match["version"]) != LATEST:
        return None
    value = match["value"]
    return CacheEntry(
        _unescape(match["uri"]),
        int(match["date"]),
        int(match["ttl"]),
        None if value is None else _unescape(value).encode("utf-8", "replace"),
    )


def serialise(entry: CacheEntry) -> bytes:
    """Return the contents of the file for ENTRY."""
    value = "#f" if entry.value is None else _quote(entry.value.decode("utf-8", "replace"))
    return (
        f"(narinfo (version {LATEST}) (cache-uri {_quote(entry.uri)}) (date {entry.date})"
        f" (ttl {entry.ttl}) (value {value}))"
    ).encode("utf-8", "replace")


def _quote(text: str) -> str:
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"'


def _unescape(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] == "x" and len(code) > 1:
            number = int(code[1:-1], 16)
            return chr(number) if number < 0xD800 or 0xE000 <= number < 0x110000 else "\ufffd"
        return _NAMED.get(code, code)

    return _ESCAPE.sub(character, text)
