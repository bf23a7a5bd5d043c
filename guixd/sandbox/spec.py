"""The container of one build as a frozen value (spec: sandbox §3 to §9).

Nothing is left to decide for who carries it out: every mount, file, variable
and id is in here.  Text is UTF-8 with surrogate escapes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bind:
    """A bind mount; a source that is a symbolic link is copied instead."""

    source: str
    target: str
    read_only: bool = True
    optional: bool = False
    """Whether a missing source is passed over."""


@dataclass(frozen=True, slots=True)
class File:
    """A file, directory or symbolic link made below the root before the mounts.

    `content` is a file's text or a link's target; `kind` is `file`, `directory` or `symlink`.
    """

    path: str
    kind: str
    mode: int = 0o755
    content: str = ""


@dataclass(frozen=True, slots=True)
class Ids:
    """Who the builder runs as (build users)."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class UserNamespace:
    """Ids in a user namespace of the build (rootless).

    `uid` and `gid` stand inside for `host_uid` and `host_gid`.  `kvm_gid`, if
    not None, is mapped as 40000 when newgidmap allows it.
    """

    uid: int
    gid: int
    host_uid: int
    host_gid: int
    kvm_gid: int | None = None


@dataclass(frozen=True, slots=True)
class Uplink:
    """The device `tap0` of a build, and the process that moves packets between it and the machine.

    For the rest see `guixd.uplink.devices.offer_tap`.
    """

    process: SandboxSpec
    ipv6: bool = False
    localnet: bool = False
    patience: float = 30.0


@dataclass(frozen=True, slots=True)
class Base:
    """What containers begin with, whatever is built: made before anything is known of that."""

    root: str
    """A directory where a file system of its own is mounted that becomes `/`."""
    gid: int | None = None
    """The group of `/`; None: that of the process."""
    files: tuple[File, ...] = ()
    """Made below the root, in this order; names as the builder will see them."""
    binds: tuple[Bind, ...] = ()
    mounts: tuple[str, ...] = ()
    """File systems of the kernel, of `/proc`, `/dev/shm` and `/dev/pts` (if the host can)."""


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """A builder and all that it will see."""

    program: str
    """The builder; with all links resolved inside it must lie in the store."""
    arguments: tuple[str, ...]
    """The argument vector, its first element (the base name) included."""
    environment: tuple[tuple[str, str], ...]
    directory: str
    """Working directory, as the builder names it."""
    store: str
    base: Base | None = None
    """None runs without a container."""
    files: tuple[File, ...] = ()
    """Made below the root after those of `base`."""
    binds: tuple[Bind, ...] = ()
    """Sorted by target."""
    mounts: tuple[str, ...] = ()
    """What is mounted after the binds."""
    ids: Ids | None = None
    """None keeps the ids of the daemon."""
    user_namespace: UserNamespace | None = None
    loopback: bool = True
    """Whether `lo` is brought up."""
    uplink: Uplink | None = None
    """How it gets at the machine's network, if it may."""
    filter: bytes = b""
    """If not empty: it moves the packets of another one under this filter, see `Uplink`."""
    personality: int = 0x0040000
    """Argument of personality(2)."""
    unsupported_platform: str = ""
    """If not empty: printed instead of running the builder, which then fails."""
    foreign_platform: str = ""
    """If not empty: printed when the kernel cannot run the builder (ENOEXEC)."""
    cgroup: str = ""
    """If not empty: the directory of the control group that the process enters."""
