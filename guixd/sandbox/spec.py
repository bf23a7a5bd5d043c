"""The container of one build as a frozen value (spec: sandbox §3 to §9).

Nothing is left to decide for who carries it out: every mount, file, variable
and id is in here.  Text is UTF-8 with surrogate escapes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any


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

    `content` is a file's text or a link's target; `kind` is `file`,
    `directory` or `symlink`.  `gid`, if not None, is its group.
    """

    path: str
    kind: str
    mode: int = 0o755
    content: str = ""
    gid: int | None = None


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
    root: str | None = None
    """The directory that becomes `/`; None runs without a container."""
    files: tuple[File, ...] = ()
    """Made below the root, in this order; names as the builder will see them."""
    binds: tuple[Bind, ...] = ()
    """Sorted by target."""
    devpts: bool = True
    """Whether to mount /dev/pts and /dev/ptmx if the host can."""
    shm: bool = True
    """Whether to mount a tmpfs at /dev/shm."""
    ids: Ids | None = None
    """None keeps the ids of the daemon."""
    user_namespace: UserNamespace | None = None
    loopback: bool = True
    """Whether `lo` is brought up."""
    personality: int = 0x0040000
    """Argument of personality(2)."""
    unsupported_platform: str = ""
    """If not empty: printed instead of running the builder, which then fails."""
    foreign_platform: str = ""
    """If not empty: printed when the kernel cannot run the builder (ENOEXEC)."""

    def encode(self) -> bytes:
        """Return the spec as bytes for the zygote: JSON, values as plain lists."""
        return json.dumps(_plain(self), separators=(",", ":"), default=_plain).encode()

    @classmethod
    def decode(cls, data: bytes) -> SandboxSpec:
        """Return what `encode` wrote."""
        values = dict(zip(_NAMES[cls], json.loads(data), strict=True))
        values["arguments"] = tuple(values["arguments"])
        values["environment"] = tuple((name, value) for name, value in values["environment"])
        values["files"] = tuple(File(*file) for file in values["files"])
        values["binds"] = tuple(Bind(*bind) for bind in values["binds"])
        if values["ids"] is not None:
            uid, gid, groups = values["ids"]
            values["ids"] = Ids(uid, gid, tuple(groups))
        if values["user_namespace"] is not None:
            values["user_namespace"] = UserNamespace(*values["user_namespace"])
        return cls(**values)


_NAMES = {
    kind: tuple(field.name for field in fields(kind))
    for kind in (Bind, File, Ids, UserNamespace, SandboxSpec)
}


def _plain(value: Any) -> list[Any]:
    return [getattr(value, name) for name in _NAMES[type(value)]]
