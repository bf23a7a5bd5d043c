"""A slirp4netns that can be given a device, for tests: this machine's, or the guest's."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.uplink.devices import DEVICE
from tests.interop import guest
from tests.support import is_root, requires, temporary_directory

_LOADER = "lib64/ld-linux-x86-64.so.2"
_WRAPPER = """#!/bin/sh
here=${0%/*}/lib
exec "$here/loader" --library-path "$here" "$here/slirp4netns" "$@"
"""


def _is_new(program: str | Path) -> bool:
    """Whether PROGRAM is of version 1.3.0 or later."""
    return b"|tapfd]" in Path(program).read_bytes()


@cache
def _source() -> str:
    """Return the program, or the root directory of the guest, or nothing."""
    program = shutil.which("slirp4netns")
    if program is not None and _is_new(program):
        return program
    try:
        root = guest.root()
    except (OSError, subprocess.CalledProcessError):
        return ""
    usable = (root / _LOADER).exists() and _is_new(root / "usr/bin/slirp4netns")
    return str(root) if usable else ""


def _available() -> bool:
    return is_root() and os.path.exists(DEVICE) and bool(_source())


requires_slirp = requires(_available, "root, /dev/net/tun and slirp4netns 1.3.0", of_kernel=True)


def slirp_directory(case: SynchronousTestCase) -> str:
    """Return a directory for PATH with such a slirp4netns."""
    source = Path(_source())
    if source.is_file():
        return str(source.parent)
    directory = Path(temporary_directory(case, world_readable=True))
    (directory / "lib").mkdir()
    loader, program = source / _LOADER, source / "usr/bin/slirp4netns"
    shutil.copy(loader, directory / "lib/loader")
    shutil.copy(program, directory / "lib")
    libraries = str(source / "usr/lib/x86_64-linux-gnu")
    listing = subprocess.run(
        [loader, "--library-path", libraries, "--list", program],
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    for line in listing.splitlines():
        if f"=> {libraries}/" in line:
            shutil.copy(line.split()[2], directory / "lib")
    return str(script(directory, _WRAPPER))


def script(directory: Path, text: str) -> Path:
    """Make TEXT the program slirp4netns of DIRECTORY, which is returned."""
    (directory / "slirp4netns").write_text(text)
    (directory / "slirp4netns").chmod(0o755)
    return directory
