"""What the end of a builder means, in words (spec: build §2, §8)."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from twisted.internet.error import ProcessTerminated

from guixd.build.container import is_native
from guixd.build.diskspace import free_bytes
from guixd.build.job import Job
from guixd.build.results import BuildFailure, Status
from guixd.formats.path import StorePath
from guixd.formats.sizes import short_size
from guixd.settings import Directories, Settings

KILLED = (
    "if nobody killed it, the machine was out of memory: the kernel's log tells;"
    " fewer builds at a time (`--max-jobs') or fewer processes in it (`--cores') need less"
)
_SHELL = 128
"""What shells add to the signal that ended a child, to tell it by their exit code."""
DISK_FULL = 8 << 20
"""Free bytes below which a failure is put down to the disk."""


def builder_failed(
    job: Job, reason: ProcessTerminated, settings: Settings, full: Sequence[str], limit: str = ""
) -> BuildFailure:
    """Return what the failure of the builder of JOB, which ended for REASON, means.

    :param full: what `full_disks` said at its end.
    :param limit: which of the daemon's limits it met, or what else was not its own fault, in
        words; empty if nothing.
    """
    if reason.signal is not None:
        name = signal.strsignal(reason.signal) or "unknown"
        end = f"failed due to signal {reason.signal} ({name})"
    else:
        end = f"failed with exit code {reason.exitCode}"
    advice = list(full)
    if limit:
        end += f": {limit}"
    elif signal.SIGKILL in (reason.signal, (reason.exitCode or 0) - _SHELL):
        advice.append(KILLED)
    advice += _foreign(job.drv.platform, settings) or _keeping(job)
    transient = bool(full or limit) or job.drv.has_fixed_outputs
    return BuildFailure(
        Status.TRANSIENT_FAILURE if transient else Status.PERMANENT_FAILURE,
        f"builder for `{job.path}' {end}",
        *advice,
        in_log=True,
    )


def full_disks(directories: Directories) -> list[str]:
    """Return what to tell of disks that builds write to and that are nearly full."""
    said = []
    places = (directories.temporary, directories.store)
    for path in {os.stat(path).st_dev: path for path in places}.values():
        free = free_bytes(path)
        if free < DISK_FULL:
            said.append(
                "the disk is nearly full, which may be why the build failed:"
                f" {short_size(free)} were free for `{path}'; `guix gc' frees space in the store"
            )
    return said


def _foreign(platform: str, settings: Settings) -> list[str]:
    """Return what it may mean that the builder is for PLATFORM."""
    if is_native(platform, settings):
        return []
    here = settings.system
    text = f"it is for `{platform}', but builders run on `{here}' here"
    if platform.partition("-")[2] == here.partition("-")[2]:
        text += ", others only if the kernel has an emulator for them (binfmt_misc)"
    return [text]


def _keeping(job: Job) -> list[str]:
    """Return how the client can look at the build directory, if it did not ask for it."""
    if job.options.keep_failed or job.options.client_uid is None:
        return []
    return ["with `--keep-failed', the next build that fails leaves its build directory"]


def timed_out(path: StorePath, reason: str) -> BuildFailure:
    """Return what it means that the build of PATH broke a limit, as REASON says."""
    return BuildFailure(Status.TIMED_OUT, f"build of `{path}' {reason}", in_log=True)
