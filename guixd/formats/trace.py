"""The machine-readable lines of a build log, beginning with `@ ` (spec: protocol §9, build §8).

Each kind of line is a frozen value whose `line` is without a final newline;
`parse` reads one back.  Texts are forced onto one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

PREFIX: Final = "@ "


def _flat(text: str) -> str:
    """Return TEXT on one line, as clients split at line breaks."""
    return text.rstrip("\n").replace("\n", " ").replace("\r", " ")


@dataclass(frozen=True, slots=True)
class BuildStarted:
    """A builder runs."""

    derivation: str
    system: str
    log_file: str
    """Empty if no log is kept."""
    pid: int

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ build-started {self.derivation} - {self.system} {self.log_file} {self.pid}"


@dataclass(frozen=True, slots=True)
class BuildSucceeded:
    """The outputs are valid."""

    derivation: str

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ build-succeeded {self.derivation} -"


@dataclass(frozen=True, slots=True)
class BuildFailed:
    """A build failed: `code` 1 in the builder or its outputs, 0 before it ran."""

    derivation: str
    code: int
    text: str

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ build-failed {self.derivation} - {self.code} {_flat(self.text)}"


@dataclass(frozen=True, slots=True)
class BuildTimedOut:
    """A build was silent or ran too long, or wrote too much."""

    derivation: str

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ build-failed {self.derivation} - timeout"


@dataclass(frozen=True, slots=True)
class BuildFailedBefore:
    """A build was not tried, as it is known to fail."""

    derivation: str

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ build-failed {self.derivation} - cached"


@dataclass(frozen=True, slots=True)
class HashMismatch:
    """A fixed output or substitute has another hash than it should."""

    path: str
    algorithm: str
    """As in the derivation, maybe with `r:`."""
    expected: str
    """In nix-base32; md5 in hexadecimal."""
    actual: str

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ hash-mismatch {self.path} {self.algorithm} {self.expected} {self.actual}"


@dataclass(frozen=True, slots=True)
class UnsupportedPlatform:
    """The builder is a program for another machine."""

    derivation: str
    system: str

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ unsupported-platform {self.derivation} {self.system}"


@dataclass(frozen=True, slots=True)
class HookFailed:
    """The offload helper ended with a raw wait `status` that it should not have."""

    derivation: str
    status: int
    text: str

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ hook-failed {self.derivation} - {self.status} {_flat(self.text)}"


@dataclass(frozen=True, slots=True)
class SubstituterStarted:
    """A path is being substituted."""

    path: str

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ substituter-started {self.path} substitute"


@dataclass(frozen=True, slots=True)
class SubstituterSucceeded:
    """A substitute is valid."""

    path: str

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ substituter-succeeded {self.path}"


@dataclass(frozen=True, slots=True)
class SubstituterFailed:
    """A path could not be substituted; `text` is the reason, `timeout` among them."""

    path: str
    text: str

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ substituter-failed {self.path} {_flat(self.text)}"


@dataclass(frozen=True, slots=True)
class DownloadStarted:
    """The first bytes of a file come.  `size` is of the whole, None if that is unknown."""

    path: str
    url: str
    size: int | None

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ download-started {self.path} {_flat(self.url)} {_known(self.size)}"


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """So much of a file is here."""

    path: str
    url: str
    size: int | None
    received: int

    @property
    def line(self) -> str:
        """The line of the log."""
        size = _known(self.size)
        return f"@ download-progress {self.path} {_flat(self.url)} {size} {self.received}"


@dataclass(frozen=True, slots=True)
class DownloadSucceeded:
    """A file is complete."""

    path: str
    url: str
    size: int

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"@ download-succeeded {self.path} {_flat(self.url)} {self.size}"


def _known(size: int | None) -> str:
    return "-" if size is None else str(size)


Trace: TypeAlias = (
    BuildStarted
    | BuildSucceeded
    | BuildFailed
    | BuildTimedOut
    | BuildFailedBefore
    | HashMismatch
    | UnsupportedPlatform
    | HookFailed
    | SubstituterStarted
    | SubstituterSucceeded
    | SubstituterFailed
)


def parse(line: str) -> Trace | None:
    """Read a LINE without its newline; None if it is no trace that we know."""
    words = line.split(" ")
    if len(words) < 3 or words[0] != "@" or "\n" in line or "\r" in line:
        return None
    event, subject, rest = words[1], words[2], words[3:]
    if rest and rest[0] == "-":
        return _parse_build(event, subject, rest[1:])
    match event, rest:
        case "hash-mismatch", [algorithm, expected, actual]:
            return HashMismatch(subject, algorithm, expected, actual)
        case "unsupported-platform", [system]:
            return UnsupportedPlatform(subject, system)
        case "substituter-started", [_]:
            return SubstituterStarted(subject)
        case "substituter-succeeded", []:
            return SubstituterSucceeded(subject)
        case "substituter-failed", [_, *_]:
            return SubstituterFailed(subject, " ".join(rest))
    return None


def _parse_build(event: str, derivation: str, rest: list[str]) -> Trace | None:
    match event, rest:
        case "build-started", [system, log_file, pid] if _is_number(pid):
            return BuildStarted(derivation, system, log_file, int(pid))
        case "build-succeeded", []:
            return BuildSucceeded(derivation)
        case "build-failed", ["timeout"]:
            return BuildTimedOut(derivation)
        case "build-failed", ["cached"]:
            return BuildFailedBefore(derivation)
        case "build-failed", [code, *text] if _is_number(code):
            return BuildFailed(derivation, int(code), " ".join(text))
        case "hook-failed", [status, *text] if _is_number(status):
            return HookFailed(derivation, int(status), " ".join(text))
    return None


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 20


def build_log(pid: int, chunk: bytes) -> bytes:
    """Return CHUNK of the builder PID as a multiplexed log has it: a line, then the bytes."""
    return b"@ build-log %d %d\n%b" % (pid, len(chunk), chunk)
