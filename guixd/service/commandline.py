"""GNU-style command lines: long options, abbreviations, optional values (getopt_long(3))."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

_HELP_COLUMN = 30
_WIDTH = 79


class UsageError(Exception):
    """The command line cannot be understood; the program exits with status 64."""


class Value(Enum):
    """Whether an option takes a value."""

    NONE = "none"
    REQUIRED = "required"
    OPTIONAL = "optional"
    """Only as `--option=VALUE`."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option as the user writes it."""

    name: str
    """Long name without the dashes; what `parse` calls it."""
    value: Value = Value.NONE
    metavar: str = ""
    help: str = ""
    """Empty hides the option from the help text."""
    short: str = ""
    alias_of: str = ""
    """The name that is reported instead of this one."""


def parse(table: Sequence[Option], arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield name and value of each option in ARGUMENTS, in order.

    :raises UsageError: an unknown or ambiguous option, a missing or superfluous
        value, or an argument that is no option.
    """
    rest = list(reversed(arguments))
    while rest:
        word = rest.pop()
        if word == "--":
            break
        if word.startswith("--"):
            written, equals, text = word[2:].partition("=")
            option = _find(table, written)
            value = text if equals else None
            if option.value is Value.NONE and value is not None:
                raise UsageError(f"option '--{option.name}' takes no value")
            if option.value is Value.REQUIRED and value is None:
                value = _next(rest, f"--{option.name}")
            yield option.alias_of or option.name, value
        elif word.startswith("-") and len(word) > 1:
            yield from _cluster(table, word[1:], rest)
        else:
            raise UsageError(f"stray argument '{word}'")
    if rest:
        raise UsageError(f"stray argument '{rest[-1]}'")


def _find(table: Sequence[Option], written: str) -> Option:
    """Return the option that WRITTEN names or abbreviates."""
    matches = [option for option in table if option.name.startswith(written)]
    for option in matches:
        if option.name == written:
            return option
    if len({option.alias_of or option.name for option in matches}) > 1:
        names = ", ".join(f"--{option.name}" for option in matches if option.help)
        raise UsageError(f"option '--{written}' is ambiguous: {names}")
    if not matches or not written:
        raise UsageError(f"unknown option '--{written}'")
    return matches[0]


def _cluster(
    table: Sequence[Option], letters: str, rest: list[str]
) -> Iterator[tuple[str, str | None]]:
    """Yield the short options of one word, such as `Vc4`."""
    while letters:
        letter, letters = letters[0], letters[1:]
        option = next((option for option in table if option.short == letter), None)
        if option is None:
            raise UsageError(f"unknown option '-{letter}'")
        if option.value is Value.NONE:
            yield option.name, None
            continue
        value: str | None = letters or None
        if value is None and option.value is Value.REQUIRED:
            value = _next(rest, f"-{letter}")
        yield option.name, value
        return


def _next(rest: list[str], option: str) -> str:
    """Take the value of OPTION from the word that follows it."""
    if not rest:
        raise UsageError(f"option '{option}' needs a value")
    return rest.pop()


def describe(option: Option) -> str:
    """Return OPTION with its value as the usage shows it."""
    if option.value is Value.REQUIRED:
        return f"--{option.name}={option.metavar}"
    if option.value is Value.OPTIONAL:
        return f"--{option.name}[={option.metavar}]"
    return f"--{option.name}"


def help_lines(table: Sequence[Option]) -> Iterator[str]:
    """Yield the table of options that are not hidden, one or more lines for each."""
    for option in table:
        if not option.help:
            continue
        short = f"-{option.short}, " if option.short else "    "
        left = f"  {short}{describe(option)}"
        lines = list(_wrap(option.help, _WIDTH - _HELP_COLUMN))
        if len(left) >= _HELP_COLUMN:
            yield left
        else:
            yield left.ljust(_HELP_COLUMN) + lines.pop(0)
        for line in lines:
            yield " " * _HELP_COLUMN + line


def usage_lines(program: str, table: Sequence[Option]) -> Iterator[str]:
    """Yield the short form: the program and its options in brackets."""
    words = [f"[{describe(option)}]" for option in table if option.help]
    start = f"Usage: {program} "
    for index, line in enumerate(_wrap(words, _WIDTH - len(start))):
        yield (start if index == 0 else " " * len(start)) + line


def _wrap(text: str | Sequence[str], width: int) -> Iterator[str]:
    """Fill words into lines of WIDTH characters."""
    line = ""
    for word in text.split() if isinstance(text, str) else text:
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = ""
        line += (" " if line else "") + word
    yield line
