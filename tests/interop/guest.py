"""A Debian guest with the stock Guix in it: client and daemon, of other hands than ours.

The guest lies in `$GUIXD_GUEST_DIR/sid` (default ~/.cache/guixd/guest/sid) and is made
once, as root, with mmdebstrap from the Debian archive that this machine's apt uses.
Nothing but packages is added to it afterwards: commands see it through a view of their own,
see view.py.  CI must be able to make it; elsewhere tests that need it are skipped without.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

from tests.support import is_root, requires

PACKAGES = (
    "guix", "ca-certificates", "busybox-static", "mount", "util-linux",
    "git", "slirp4netns", "lzip", "zstd", "sqlite3", "guile-zstd",
)  # fmt: skip
BUILD_USERS = range(30001, 30011)
BUILD_GROUP = 30000
PLAIN_USER = 31000
# Who has a build user kills its processes, wherever: other ones in each process that tests.
FIRST_UID = 2_000_000 + 16 * os.getpid()
BUILD_UIDS = f"{FIRST_UID}-{FIRST_UID + len(BUILD_USERS) - 1}:{BUILD_GROUP}"
"""The same for guixd's option `--build-uids`."""

_VIEW = Path(__file__).with_name("view.py")


def directory() -> Path:
    """Return the directory that holds the guest."""
    return Path(os.environ.get("GUIXD_GUEST_DIR") or Path.home() / ".cache/guixd/guest")


def debian_archive(sources: str) -> str | None:
    """Return the first Debian archive in SOURCES, text of apt's lists, either notation."""
    found = re.search(
        r"^(?:URIs:\s*|deb\s+(?:\[[^]]*\]\s+)?)(\S+/debian)/*(?=\s|$)", sources, re.MULTILINE
    )
    return found.group(1) if found else None


def _apt_sources() -> str:
    etc = Path("/etc/apt")
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    return "\n".join(
        file.read_text()
        for file in files
        if file.suffix in (".list", ".sources") and file.is_file()
    )


def _make(root: Path) -> None:
    archive = debian_archive(_apt_sources())
    if archive is None:
        raise OSError("/etc/apt names no Debian archive")
    if root.exists():
        shutil.rmtree(root)
    subprocess.run(
        [
            "mmdebstrap", "--variant=apt", "--include=" + ",".join(PACKAGES),
            '--aptopt=Acquire::Check-Valid-Until "false"',
            "sid", str(root), f"deb [trusted=yes] {archive} sid main",
        ],
        check=True,
    )  # fmt: skip
    # Entries are appended rather than made with useradd, which a guest may come without.
    members = [f"guixbuilder{uid - BUILD_GROUP:02}" for uid in BUILD_USERS]
    with (root / "etc/group").open("a") as group:
        group.write(f"guixbuild:x:{BUILD_GROUP}:{','.join(members)}\nguixtest:x:{PLAIN_USER}:\n")
    with (root / "etc/passwd").open("a") as passwd:
        for uid, name in zip(BUILD_USERS, members, strict=True):
            passwd.write(f"{name}:x:{uid}:{BUILD_GROUP}:build user:/var/empty:/usr/sbin/nologin\n")
        passwd.write(f"guixtest:x:{PLAIN_USER}:{PLAIN_USER}::/home/guixtest:/bin/sh\n")
    (root / ".complete").write_text(" ".join(PACKAGES))


def _add_packages(root: Path) -> None:
    """Install what has been added to PACKAGES since the guest was made."""
    install = "apt-get -qy --no-install-recommends install " + " ".join(PACKAGES)
    command = f"apt-get -q -o Acquire::Check-Valid-Until=false update && {install}"
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["chroot", str(root), "sh", "-c", command], check=True, env=environment)
    (root / ".complete").write_text(" ".join(PACKAGES))


@cache
def root() -> Path:
    """Return the guest's root directory, made if it is not there yet.

    :raises OSError, subprocess.CalledProcessError: it cannot be made here.
    """
    place = directory()
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complete = place / "sid/.complete"
        if not complete.exists():
            _make(place / "sid")
        elif complete.read_text() != " ".join(PACKAGES):
            _add_packages(place / "sid")
    return place.resolve() / "sid"


class BuildUsers:
    """The guest's build users, for one test process of the machine at a time.

    Two daemons that do not share a state directory would kill each other's builders.
    """

    _held = 0
    _lock: IO[str] | None = None

    @classmethod
    def claim(cls) -> None:
        """Wait until no other process has them; claims of one process add up."""
        if not cls._held:
            cls._lock = (directory() / "build-users").open("w")
            fcntl.flock(cls._lock, fcntl.LOCK_EX)
        cls._held += 1

    @classmethod
    def release(cls) -> None:
        """Give one claim back."""
        cls._held -= 1
        if not cls._held and cls._lock is not None:
            cls._lock.close()


@cache
def _available() -> bool:
    if not is_root():
        return False
    try:
        root()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no guest: {error}")
        return False
    return True


requires_guest = requires(_available, "root and a guest with the stock Guix")


def view(
    base: Path, binds: Mapping[str, str], command: Sequence[str], user: int | None = None
) -> list[str]:
    """Return the command line that runs COMMAND with BASE as its root.

    :param binds: from places in the view to directories of this machine.
    :param user: uid, and gid, to run as; root by default.
    """
    pairs = [f"{source}:{place}" for place, source in binds.items()]
    enter = [sys.executable, "-I", "-S", str(_VIEW), str(base)]
    return [*enter, "-" if user is None else str(user), *pairs, "--", *command]


def with_own_users(directory: Path) -> dict[str, str]:
    """Return the bind that gives the guest's build users the ids from `FIRST_UID`.

    :param directory: where to put the file that is bound.
    """
    passwd = (root() / "etc/passwd").read_text()
    for number, uid in enumerate(BUILD_USERS):
        passwd = passwd.replace(f":x:{uid}:", f":x:{FIRST_UID + number}:")
    (directory / "passwd").write_text(passwd)
    return {"/etc/passwd": str(directory / "passwd")}
