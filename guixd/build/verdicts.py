"""What the end of a builder means, in words (build.md §2, §8)."""

from __future__ import annotations

import os
import signal

from twisted.internet.error import ProcessTerminated

from guixd.build.job import Job
from guixd.build.request import Level
from guixd.build.results import BuildFailure, Status
from guixd.formats.path import StorePath
from guixd.formats.sizes import short_size
from guixd.settings import Directories

DISK_FULL = 8 << 20
"""Free bytes below which a failure is put down to the disk."""


def builder_failed(
    job: Job, reason: ProcessTerminated, directories: Directories, limit: str = ""
) -> BuildFailure:
    """Return what the failure of the builder of JOB, which ended for REASON, means.

    :param limit: which of the daemon's limits it met, in words; empty if none.
    """
    if reason.signal is not None:
        name = signal.strsignal(reason.signal) or "unknown"
        end = f"failed due to signal {reason.signal} ({name})"
    else:
        end = f"failed with exit code {reason.exitCode}"
    full = False
    for path in dict.fromkeys((directories.store, directories.temporary)):
        free = _free(path)
        if free < DISK_FULL:
            full = True
            job.say.log(
                Level.ERROR,
                "the disk is nearly full, which may be why the build failed:"
                f" {short_size(free)} are free for `{path}'",
            )
    if limit:
        end += f": {limit}"
    transient = full or bool(limit) or job.drv.has_fixed_outputs
    return BuildFailure(
        Status.TRANSIENT_FAILURE if transient else Status.PERMANENT_FAILURE,
        f"builder for `{job.path}' {end}",
    )


def timed_out(path: StorePath, reason: str) -> BuildFailure:
    """Return what it means that the build of PATH broke a limit, as REASON says."""
    return BuildFailure(Status.TIMED_OUT, f"build of `{path}' {reason}")


def _free(path: str) -> int:
    """Return how many bytes users may still write to the file system of PATH."""
    free = os.statvfs(path)
    return free.f_bavail * free.f_frsize
