"""Limits of a running build: silence, time and length of its log (spec: build §5)."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime


class Watchdog:
    """Calls EXPIRED once, with the reason, when a build breaks a limit.

    The time in which the builder is held because nobody takes its output does
    not count as silence.

    :param silence: seconds without output, 0 for no limit.
    :param total: seconds since the start, 0 for no limit.
    :param size: bytes of output, 0 for no limit.
    """

    def __init__(
        self,
        clock: IReactorTime,
        expired: Callable[[str], None],
        *,
        silence: int = 0,
        total: int = 0,
        size: int = 0,
    ) -> None:
        self._clock = clock
        self._expired = expired
        self._silence = silence
        self._size = size
        self._written = 0
        self._held = False
        self._last = clock.seconds()
        self._quiet: IDelayedCall | None = None
        self._total: IDelayedCall | None = None
        if silence:
            self._quiet = clock.callLater(silence, self._look)
        if total:
            text = f"timed out after {total} seconds, {_set_by('--timeout')}"
            self._total = clock.callLater(total, self._expire, text)

    def heard(self, size: int) -> None:
        """Say that SIZE bytes of output came."""
        self._last = self._clock.seconds()
        self._written += size
        if self._size and self._written > self._size:
            limit = _set_by("build-max-log-size")
            self._expire(f"wrote more than {self._size} bytes of log, {limit}")

    def hold(self, on: bool) -> None:
        """Say whether the builder is held from now on."""
        if self._held and not on:
            self._last = self._clock.seconds()
        self._held = on

    def _look(self) -> None:
        now = self._clock.seconds()
        if self._held:
            self._last = now
        left = self._last + self._silence - now
        if left > 0:
            self._quiet = self._clock.callLater(left, self._look)
        else:
            self._quiet = None
            limit = _set_by("--max-silent-time")
            self._expire(f"timed out after {self._silence} seconds of silence, {limit}")

    def _expire(self, reason: str) -> None:
        self.stop()
        self._expired(reason)

    def stop(self) -> None:
        """Watch no longer."""
        for timer in self._quiet, self._total:
            if timer is not None and timer.active():
                timer.cancel()
        self._quiet = self._total = None
        self._size = 0


def _set_by(option: str) -> str:
    return f"the limit that the option `{option}' of the client or the daemon sets"
