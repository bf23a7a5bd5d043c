"""Configuration directories with keys for tests, and what the stock signer wrote with these.

`ecc` is a key as `guix archive --generate-key` makes it, `rsa` one as it makes with
`(genkey (rsa (nbits 4:2048)))`; the lists `*.acl` and the signatures of `SIGNED` were
made with them by `guix authenticate` 1.5.0.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.support import temporary_directory

GOLDEN = Path(__file__).parents[1] / "golden/signatures"
SIGNED = bytes.fromhex("0807B7C25B37EFFA1FF1371FABA593621210297F9A5D2B283BA5073BFFA4AAB1")


def golden(name: str) -> bytes:
    """Return a recorded file."""
    return (GOLDEN / name).read_bytes()


def install(directory: str | Path, kind: str = "ecc", *, acl: bool = False) -> None:
    """Put the key KIND into the configuration DIRECTORY, and a list of it if ACL."""
    os.makedirs(directory, exist_ok=True)
    for suffix, mode in ("sec", 0o400), ("pub", 0o444):
        file = Path(directory) / f"signing-key.{suffix}"
        shutil.copy(GOLDEN / f"{kind}.{suffix}", file)
        file.chmod(mode)
    if acl:
        shutil.copy(GOLDEN / f"{kind}.acl", Path(directory) / "acl")


def configuration(case: SynchronousTestCase, kind: str = "ecc", *, acl: bool = True) -> Path:
    """Return a configuration directory with the key KIND, and a list of it if ACL."""
    directory = Path(temporary_directory(case))
    install(directory, kind, acl=acl)
    return directory
