"""What an administrator chose: directories and options (spec: options §1, §4)."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

DEFAULT_SUBSTITUTE_URLS = ("https://bordeaux.guix.gnu.org", "https://ci.guix.gnu.org")


def this_system() -> str:
    """Return the system type of this machine, such as `x86_64-linux`."""
    machine = platform.machine()
    if machine in ("i386", "i486", "i586", "i686"):
        machine = "i686"
    elif machine.startswith("armv"):
        machine = "armhf"
    return f"{machine}-linux"


@dataclass(frozen=True, slots=True)
class Directories:
    """Where everything lies; absolute, canonical file names."""

    store: str = "/gnu/store"
    state: str = "/var/guix"
    log: str = "/var/log/guix"
    database: str = "/var/guix/db"
    configuration: str = "/etc/guix"
    temporary: str = "/tmp"
    """Parent of the build trees, symbolic links resolved."""

    @property
    def socket(self) -> str:
        """The socket that is listened on when no other is asked for."""
        return self.state + "/daemon-socket/socket"


@dataclass(frozen=True, slots=True)
class UidRange:
    """Numeric build users that need no entry in any file."""

    first: int
    count: int
    gid: int


@dataclass(frozen=True, slots=True)
class BuildLimits:
    """What each build may use; 0 is "no limit"."""

    memory: int = 0
    """Bytes."""
    processes: int = 0
    """Threads count, too."""
    cpu_weight: int = 0
    """From 1 to 10000; 100 is what other groups have by default."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of the daemon, typed; times are in seconds, 0 is "no limit"."""

    directories: Directories = field(default_factory=Directories)
    listen: tuple[str, ...] = ()
    build_users_group: str | None = None
    build_uids: UidRange | None = None
    use_chroot: bool = True
    chroot_directories: tuple[tuple[str, str], ...] = ()
    """Pairs of the name inside and the source outside."""
    cores: int = 0
    max_jobs: int = 1
    timeout: int = 86400
    max_silent_time: int = 3600
    max_log_size: int = 0
    build_limits: BuildLimits = BuildLimits()
    min_free_disk: int = 0
    """Bytes that must be free for a build to begin."""
    stop_timeout: int = 3
    """How long what is at work may go on when the daemon is told to stop."""
    rounds: int = 1
    use_substitutes: bool = True
    substitute_urls: tuple[str, ...] = DEFAULT_SUBSTITUTE_URLS
    offload: bool = True
    discover: bool = False
    cache_failures: bool = False
    keep_log: bool = True
    log_compression: str = "gzip"
    """`gzip`, `bzip2` or `none`."""
    deduplicate: bool = True
    gc_keep_outputs: bool = False
    gc_keep_derivations: bool = True
    impersonate_linux_26: bool = False
    isolate_host_loopback: bool = False
    refuse_private_hosts: bool = False
    """Whether what clients name is only fetched from public addresses."""
    max_connections_per_user: int = 4096
    greeting_timeout: int = 300
    idle_timeout: int = 0
    system: str = field(default_factory=this_system)
    debug: bool = False
    ignore_symlink_store: bool = False
    """Whether the store may be a symbolic link (NIX_IGNORE_SYMLINK_STORE=1)."""
    durable: bool = True
    """Whether what is valid survives a power cut; only tests do without."""
