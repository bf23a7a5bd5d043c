"""How a build ended (spec: build §2)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from errno import EDQUOT, ENOSPC

from guixd.errors import GuixdError


class Status(Enum):
    """The ways a build ends."""

    BUILT = "built"
    SUBSTITUTED = "substituted"
    ALREADY_VALID = "already-valid"
    PERMANENT_FAILURE = "permanent-failure"
    INPUT_REJECTED = "input-rejected"
    CACHED_FAILURE = "cached-failure"
    OUTPUT_REJECTED = "output-rejected"
    TRANSIENT_FAILURE = "transient-failure"
    TIMED_OUT = "timed-out"
    MISC_FAILURE = "misc-failure"
    DEPENDENCY_FAILED = "dependency-failed"
    NO_SUBSTITUTERS = "no-substituters"
    INCOMPLETE_CLOSURE = "incomplete-closure"

    @property
    def succeeded(self) -> bool:
        """Whether the outputs are valid."""
        return self in (Status.BUILT, Status.SUBSTITUTED, Status.ALREADY_VALID)

    @property
    def of_builder(self) -> bool:
        """Whether a builder has run, and failed."""
        return self in (
            Status.PERMANENT_FAILURE,
            Status.OUTPUT_REJECTED,
            Status.TRANSIENT_FAILURE,
            Status.TIMED_OUT,
        )

    @property
    def code(self) -> int:
        """The status integer of a request in which this is the worst."""
        if self is Status.TIMED_OUT:
            return 101
        if self in (Status.PERMANENT_FAILURE, Status.INPUT_REJECTED, Status.CACHED_FAILURE):
            return 100
        return 1


@dataclass(frozen=True, slots=True)
class Result:
    """The end of one build.

    :ivar text: what went wrong; empty after success.
    :ivar general: whether the daemon or the machine is to blame, not the
        derivation; the request's error then carries `text` itself.
    :ivar advice: lines for people that say what to do next.
    :ivar in_log: whether the end of the builder's log is likely to tell more.
    """

    status: Status
    text: str = ""
    general: bool = False
    advice: tuple[str, ...] = ()
    in_log: bool = False

    @property
    def message(self) -> str:
        """All lines for people."""
        return "\n".join((self.text, *self.advice))


def result_of(error: BaseException) -> Result:
    """Return the result of a build that ERROR ended."""
    if isinstance(error, BuildFailure):
        return error.result
    if isinstance(error, OSError):
        where = f" '{error.filename}'" if error.filename else ""
        text = f"cannot access{where}: {error.strerror or error}"
    else:
        text = error.text if isinstance(error, GuixdError) else str(error) or repr(error)
    if any(
        isinstance(each, OSError) and each.errno in (ENOSPC, EDQUOT)
        for each in (error, error.__cause__)
    ):
        text += "; `guix gc' frees space in the store"
    return Result(Status.MISC_FAILURE, text, general=True)


class BuildFailure(Exception):
    """Ends an attempt with a `Result`; internal to this layer."""

    def __init__(
        self,
        status: Status,
        text: str,
        *advice: str,
        general: bool = False,
        in_log: bool = False,
    ) -> None:
        super().__init__(text)
        self.result = Result(status, text, general, advice, in_log)
