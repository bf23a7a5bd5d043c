"""S-expressions as libgcrypt and the stock tools write them (spec: store §13).

An expression is a tuple whose members are atoms (`bytes`) and further tuples.  The
text has many forms; `canonical` is the one form that leaves nothing to choose.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final, TypeAlias, Union

from guixd.errors import BadExpression

Expression: TypeAlias = "tuple[bytes | Expression, ...]"
Member: TypeAlias = Union[bytes, "Expression"]

MAX_SIZE: Final = 1024 * 1024
"""Bytes of the longest text that is read."""
MAX_DEPTH: Final = 32
"""Most lists within each other."""

_TOKEN_CHARACTERS = rb"A-Za-z0-9\-./_:*+="
_TOKEN = re.compile(rb"(?![0-9])[" + _TOKEN_CHARACTERS + rb"]+")
_BLANK = re.compile(rb"[ \t\v\n\f\r]*")
_NEXT = re.compile(
    rb"(?P<open>\()|(?P<close>\))"
    rb"|#(?P<hex>[0-9A-Fa-f \t\v\n\f\r]*)#"
    rb'|"(?P<quoted>(?:[^"\\]|\\.)*+)"'
    rb"|\|(?P<base64>[A-Za-z0-9+/= \t\v\n\f\r]*)\|"
    rb"|(?P<length>0|[1-9][0-9]{0,8}):"
    rb"|(?P<token>(?![0-9])[" + _TOKEN_CHARACTERS + rb"]+)",
    re.DOTALL,
)
_ESCAPE = re.compile(rb"\\(?:([0-7]{3})|x([0-9A-Fa-f]{2})|(\r\n|\n\r|\r|\n)|(.))", re.DOTALL)
_SPACES = b" \t\v\n\f\r"
_MEANINGS: Final[dict[bytes, bytes]] = {
    b"b": b"\b", b"t": b"\t", b"v": b"\v", b"n": b"\n", b"f": b"\f", b"r": b"\r",
    b'"': b'"', b"'": b"'", b"\\": b"\\",
}  # fmt: skip
_ESCAPES: Final = {meaning[0]: b"\\" + letter for letter, meaning in _MEANINGS.items()}
_ESCAPES[0] = rb"\x00"
# What is printed as text: ASCII and the upper half of Latin-1, zeros further on, too.
_TEXT = re.compile(rb"[\b\t\v\n\f\r\x20-\x7e][\0\b\t\v\n\f\r\x20-\x7e\xa1-\xff]*")
# With zeros in it, libgcrypt would print a token that nobody can read.
_TOKEN_AND_ZEROS = re.compile(rb"(?![0-9])[\0" + _TOKEN_CHARACTERS + rb"]+")


def parse(text: bytes, *, max_size: int = MAX_SIZE) -> Expression:
    """Return the one list that TEXT holds, blanks around it apart.

    :raises BadExpression: it is not one list, malformed, too long or too deep.
    """
    if len(text) > max_size:
        raise BadExpression(f"S-expression of more than {max_size} bytes")
    outer: list[list[Member]] = []
    current: list[Member] = []
    at = _skip(text, 0)
    while True:
        found = _NEXT.match(text, at)
        if found is None:
            raise BadExpression(f"malformed S-expression (at byte {at})")
        at = found.end()
        kind = found.lastgroup
        if kind == "open":
            outer.append(current)
            current = []
            if len(outer) > MAX_DEPTH:
                raise BadExpression("S-expression is nested too deeply")
        elif not outer:
            raise BadExpression("S-expression does not begin with a parenthesis")
        elif kind == "close":
            done = tuple(current)
            current = outer.pop()
            current.append(done)
            if not outer:
                break
        elif kind == "length":
            end = at + int(found["length"])
            if end > len(text):
                raise BadExpression("S-expression ends within an atom")
            current.append(text[at:end])
            at = end
        else:
            current.append(_atom(kind, found, at))
        at = _skip(text, at)
    if _skip(text, at) != len(text):
        raise BadExpression(f"something follows the S-expression (at byte {at})")
    return done


def _skip(text: bytes, at: int) -> int:
    found = _BLANK.match(text, at)
    assert found is not None
    return found.end()


def _atom(kind: str | None, found: re.Match[bytes], at: int) -> bytes:
    """Return the value of an atom that was FOUND up to AT."""
    try:
        if kind == "hex":
            return binascii.unhexlify(found["hex"].translate(None, _SPACES))
        if kind == "base64":
            return base64.b64decode(found["base64"].translate(None, _SPACES), validate=True)
    except ValueError:
        raise BadExpression(f"malformed atom in an S-expression (before byte {at})") from None
    return found["token"] if kind == "token" else _ESCAPE.sub(_unescape, found["quoted"])


def _unescape(found: re.Match[bytes]) -> bytes:
    octal, hexadecimal, end_of_line, letter = found.groups()
    if octal is not None and int(octal, 8) < 256:
        return bytes([int(octal, 8)])
    if hexadecimal is not None:
        return bytes([int(hexadecimal, 16)])
    if end_of_line is not None:
        return b""
    if letter not in _MEANINGS:
        raise BadExpression("unknown escape in a string of an S-expression")
    return _MEANINGS[letter]


def canonical(expression: Expression) -> bytes:
    """Return EXPRESSION in the form `(4:name5:value)`."""
    out: list[bytes] = []
    pending: list[Member | None] = [expression]
    while pending:
        member = pending.pop()
        if member is None:
            out.append(b")")
        elif isinstance(member, bytes):
            out.append(b"%d:%b" % (len(member), member))
        else:
            out.append(b"(")
            pending.append(None)
            pending += reversed(member)
    return b"".join(out)


def pretty(expression: Expression) -> bytes:
    """Return EXPRESSION on several lines, exactly as libgcrypt prints it."""
    out: list[bytes] = []
    pending: list[tuple[Expression, int]] = [(expression, 0)]
    while pending:
        members, index = pending.pop()
        depth = len(pending)
        if not index:
            out.append(b"\n" + b" " * depth + b"(" if depth else b"(")
        for position in range(index, len(members)):
            member = members[position]
            if not isinstance(member, bytes):
                pending += ((members, position + 1), (member, 0))
                break
            if position and not isinstance(members[position - 1], bytes):
                out.append(b"\n" + b" " * (depth + 1))
            out.append(_printed(member))
            if position + 1 < len(members):
                out.append(b" ")
        else:
            within = members and not isinstance(members[-1], bytes)
            out.append(b"\n" + b" " * (depth + 1) + b")" if within else b")")
    out.append(b"\n")
    return b"".join(out)


def _printed(atom: bytes) -> bytes:
    """Return ATOM as a word, a quoted string or in hexadecimal, whichever is usual for it."""
    if _TOKEN.fullmatch(atom):
        return atom
    if _TEXT.fullmatch(atom) and not _TOKEN_AND_ZEROS.fullmatch(atom):
        return b'"' + b"".join([_ESCAPES.get(byte) or bytes([byte]) for byte in atom]) + b'"'
    return b"#" + atom.hex().upper().encode() + b"#"
