"""Reading one printed datum of Scheme, as clients put them into derivations (spec: downloads §3).

Strings become `str`, symbols `Symbol`, lists tuples, numbers `int`, and `#t` and `#f`
`bool`.  Nothing is ever evaluated while reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeAlias

DEEPEST = 100
_TOKEN = re.compile(
    r"""(?:\s|;[^\n]*(?:\n|\Z))*+
        (?: (?P<open>[(\[]) | (?P<close>[)\]]) | (?P<quote>')
          | "(?P<string>(?:[^"\\]|\\.)*+)"
          | (?P<end>\Z)
          | (?P<atom>[^\s()\[\]"';]++) )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(
    r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{6})|(\n[ \t]*)|(.))", re.DOTALL
)
_ESCAPED = {
    "\\": "\\",
    '"': '"',
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "0": "\0",
}
_BRACKETS = {"(": ")", "[": "]"}
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}\Z")
_SYMBOL = re.compile(r"[^#|,`\\][^|,`\\]*\Z")


class BadDatum(ValueError):
    """A text is not one printed datum, or one of a kind that is not known here."""


class Symbol(str):
    """The name of a symbol; equal only to other symbols."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Symbol) and str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(("symbol", str(self)))


Datum: TypeAlias = "str | int | tuple[Datum, ...]"
"""A `Symbol` is a `str`, and a `bool` an `int`."""
QUOTE = Symbol("quote")


def parse(text: str) -> Datum:
    """Return the datum that TEXT is, with nothing else around it but blanks and comments.

    :raises BadDatum: it is not one.
    """
    tokens = _tokens(text)
    datum = _read(tokens, next(tokens), 0)
    if next(tokens)[0] != "end":
        raise BadDatum("something follows the datum")
    return datum


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while True:
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise BadDatum("a string does not end")
        yield match.lastgroup, match[match.lastgroup]
        position = match.end()


def _read(tokens: Iterator[tuple[str, str]], token: tuple[str, str], depth: int) -> Datum:
    kind, text = token
    if depth > DEEPEST:
        raise BadDatum("lists are too deep")
    if kind == "string":
        return _ESCAPE.sub(_unescape, text)
    if kind == "quote":
        return QUOTE, _read(tokens, next(tokens), depth + 1)
    if kind == "open":
        items = []
        while (token := next(tokens))[0] != "close":
            items.append(_read(tokens, token, depth + 1))
        if token[1] != _BRACKETS[text]:
            raise BadDatum("the parentheses do not match")
        return tuple(items)
    if kind != "atom":
        raise BadDatum("the datum is incomplete" if kind == "end" else "too many parentheses")
    return _atom(text)


def _atom(text: str) -> Datum:
    if text in ("#t", "#true"):
        return True
    if text in ("#f", "#false"):
        return False
    if _INTEGER.match(text):
        return int(text)
    if _SYMBOL.match(text) and text != ".":
        return Symbol(text)
    raise BadDatum(f"'{text[:40]}' is not understood")


def _unescape(match: re.Match[str]) -> str:
    number = match[1] or match[2] or match[3]
    if number:
        code = int(number, 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise BadDatum("an escape in a string is no character")
        return chr(code)
    if match[4]:
        return ""
    try:
        return _ESCAPED[match[5]]
    except KeyError:
        raise BadDatum(f"the escape \\{match[5]} in a string is not known") from None
