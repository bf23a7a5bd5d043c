"""What a builder gets: environment and container, as a value (spec: build §7, sandbox §4-§9)."""

from __future__ import annotations

import grp
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from guixd.build.users import BuildUser
from guixd.errors import SandboxError
from guixd.formats.derivation import Derivation
from guixd.formats.path import StorePath
from guixd.formats.trace import UnsupportedPlatform
from guixd.sandbox.spec import Base, Bind, File, Ids, SandboxSpec, UserNamespace
from guixd.settings import Settings

GUEST_UID = 30001
GUEST_GID = 30000
"""Ids in a user namespace, where they stand for those of the daemon."""
HOMELESS = "/homeless-shelter"

_DEVICES = tuple(
    Bind(f"/dev/{name}", f"/dev/{name}", read_only=False, optional=True)
    for name in ("full", "null", "random", "tty", "urandom", "zero")
)
_KVM = Bind("/dev/kvm", "/dev/kvm", read_only=False, optional=True)
_DEVICE_LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
)
_NETWORK_FILES = ("/etc/hosts", "/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/services")
_ADDR_NO_RANDOMIZE = 0x0040000
_UNAME26 = 0x0020000
_LINUX32 = 8
_X86 = ("i686-linux", "x86_64-linux")


@dataclass(frozen=True, slots=True)
class Host:
    """What the plan depends on besides settings and derivation."""

    uid: int
    gid: int
    machine: str = "x86_64"
    kvm_gid: int | None = None
    """The group `kvm` if the daemon is in it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The daemon's, for `impureEnvVars`."""

    @classmethod
    def current(cls) -> Host:
        """Return what holds for this process."""
        try:
            kvm: int | None = grp.getgrnam("kvm").gr_gid
        except KeyError:
            kvm = None
        return cls(
            uid=os.geteuid(),
            gid=os.getegid(),
            machine=platform.machine(),
            kvm_gid=kvm if kvm in os.getgroups() else None,
            environment=dict(os.environ),
        )


def inner_directory(path: StorePath) -> str:
    """Return the build directory of the derivation PATH as its builder names it."""
    return f"/tmp/guix-build-{path.name}-0"


def plan(
    derivation: Derivation,
    path: StorePath,
    inputs: Iterable[StorePath],
    *,
    build_directory: str,
    private: str | None,
    user: BuildUser | None,
    settings: Settings,
    cores: int,
    host: Host,
    allow_root: bool = False,
) -> SandboxSpec:
    """Return the container of the derivation at PATH.

    :param inputs: the closure of all that the builder may see.
    :param build_directory: the build directory as the host names it.
    :param private: the directory with those that become the store and /tmp, see
        `Workspace`; `None` for no container.
    :param user: who runs the builder; `None` for the daemon's own user.
    :param cores: value of `NIX_BUILD_CORES`, 0 for all.
    :param allow_root: whether the daemon's own user may be root.
    :raises SandboxError: the builder would be root, or, without a container, see
        a directory `/homeless-shelter`.
    """
    if user is None and host.uid == 0 and not allow_root:
        raise SandboxError(
            "plan", "no builds as root: the daemon needs '--build-users-group' or another user"
        )
    if private is None and os.path.lexists(HOMELESS):
        raise SandboxError("plan", f"'{HOMELESS}' exists, which builds must not find; remove it")
    directory = build_directory if private is None else inner_directory(path)
    fixed = derivation.has_fixed_outputs
    unsupported, foreign = _platform_texts(derivation, path, settings)
    return SandboxSpec(
        program=derivation.builder,
        arguments=(derivation.builder.rpartition("/")[2], *derivation.arguments),
        environment=environment(derivation, directory, settings, cores, host.environment),
        directory=directory,
        store=settings.directories.store,
        base=None if private is None else _base(user, settings),
        files=() if private is None else _files(user, fixed=fixed),
        binds=(
            ()
            if private is None
            else _binds(derivation, inputs, build_directory, directory, private, settings)
        ),
        mounts=_late_mounts(settings),
        ids=None if user is None else Ids(user.uid, user.gid, user.groups),
        user_namespace=(
            UserNamespace(GUEST_UID, GUEST_GID, host.uid, host.gid, host.kvm_gid)
            if private is not None and user is None
            else None
        ),
        loopback=not fixed or settings.isolate_host_loopback,
        personality=_personality(derivation.platform, settings, host.machine),
        unsupported_platform=unsupported,
        foreign_platform=foreign,
    )


def environment(
    derivation: Derivation,
    directory: str,
    settings: Settings,
    cores: int,
    impure: Mapping[str, str],
) -> tuple[tuple[str, str], ...]:
    """Return the builder's variables, sorted by bytes (spec: build §7).

    :param directory: the build directory as the builder names it.
    :param impure: where the variables named in `impureEnvVars` come from.
    """
    variables = {
        "PATH": "/path-not-set",
        "HOME": HOMELESS,
        "NIX_STORE": settings.directories.store,
        "NIX_BUILD_CORES": str(cores),
        **derivation.environment,
    }
    for name in ("NIX_BUILD_TOP", "TMPDIR", "TEMPDIR", "TMP", "TEMP", "PWD"):
        variables[name] = directory
    if derivation.has_fixed_outputs:
        for name in derivation.environment.get("impureEnvVars", "").split():
            variables[name] = impure.get(name, "")
    return tuple((name, variables[name]) for name in _by_bytes(variables))


def _by_bytes(names: Iterable[str]) -> list[str]:
    """Sort as bytes are; characters are in the same order if all are ASCII."""
    names = list(names)
    names.sort(key=None if "".join(names).isascii() else os.fsencode)
    return names


def _maps(settings: Settings, *targets: str) -> bool:
    return any(target in targets for target, _ in settings.chroot_directories)


def root_directory(settings: Settings) -> str:
    """Return the empty directory where `/` of containers is mounted, in their own namespaces."""
    return settings.directories.state + "/container"


def _base(user: BuildUser | None, settings: Settings) -> Base:
    mapped = tuple(target for target, _ in settings.chroot_directories)
    gid = None if user is None else user.gid
    return _standard_base(root_directory(settings), gid, mapped)


@lru_cache(maxsize=4)
def _standard_base(root: str, gid: int | None, mapped: tuple[str, ...]) -> Base:
    if "/dev" in mapped:
        return Base(root, gid, mounts=("/proc",))
    return Base(
        root,
        gid,
        files=tuple(File(name, "symlink", content=target) for name, target in _DEVICE_LINKS),
        binds=tuple(device for device in _DEVICES if device.target not in mapped),
        mounts=("/proc", "/dev/shm", *(("/dev/pts",) if "/dev/pts" not in mapped else ())),
    )


def _late_mounts(settings: Settings) -> tuple[str, ...]:
    """Return what is mounted below a /dev of the administrator."""
    return ("/dev/shm",) if _maps(settings, "/dev") else ()


def _files(user: BuildUser | None, *, fixed: bool) -> tuple[File, ...]:
    uid, gid = (GUEST_UID, GUEST_GID) if user is None else (user.uid, user.gid)
    return _standard_files(uid, gid, hosts=not fixed)


@lru_cache(maxsize=64)
def _standard_files(uid: int, gid: int, *, hosts: bool) -> tuple[File, ...]:
    passwd = (
        f"nixbld:x:{uid}:{gid}:Nix build user:/:/noshell\nnobody:x:65534:65534:Nobody:/:/noshell\n"
    )
    files = [
        File("/etc/passwd", "file", 0o644, passwd),
        File("/etc/group", "file", 0o644, f"nixbld:!:{gid}:\n"),
    ]
    if hosts:
        files.append(File("/etc/hosts", "file", 0o644, "127.0.0.1 localhost\n::1 localhost\n"))
    return tuple(files)


def _binds(
    derivation: Derivation,
    inputs: Iterable[StorePath],
    build_directory: str,
    directory: str,
    private: str,
    settings: Settings,
) -> tuple[Bind, ...]:
    """Return the mounts (spec: sandbox §5) sorted by target; later entries replace earlier."""
    binds: dict[str, Bind] = {}

    def add(source: str, target: str, *, read_only: bool, optional: bool = False) -> None:
        binds[target] = Bind(source, target, read_only, optional)

    if not _maps(settings, "/dev"):  # It may turn up at any time.
        binds[_KVM.target] = _KVM
    if derivation.has_fixed_outputs:
        for name in _NETWORK_FILES:
            add(os.path.realpath(name), name, read_only=True, optional=True)
    store = settings.directories.store
    add(f"{private}/tmp", "/tmp", read_only=False)
    add(f"{private}/store", store, read_only=False)
    add(build_directory, directory, read_only=False)
    binds.update(_item_binds(frozenset(inputs)))
    for output in derivation.output_paths:
        binds.pop(output, None)
    for target, source in settings.chroot_directories:
        names = (source + "/", os.path.realpath(source) + "/")
        inside = any(name.startswith(store + "/") for name in names)
        add(source, target, read_only=inside)
    return tuple(binds[target] for target in _by_bytes(binds))


@lru_cache(maxsize=16)
def _item_binds(items: frozenset[StorePath]) -> tuple[tuple[str, Bind], ...]:
    """Return the mounts of store items by target; builds often have the same inputs."""
    return tuple((item, Bind(item, item)) for item in items)


def _personality(system: str, settings: Settings, machine: str) -> int:
    persona = _ADDR_NO_RANDOMIZE
    x86 = "x86_64-linux" in (settings.system, machine + "-linux")
    arm = "aarch64-linux" in (settings.system, machine + "-linux")
    if (system == "i686-linux" and x86) or (system == "armhf-linux" and arm):
        persona |= _LINUX32
    if settings.impersonate_linux_26 and system in _X86:
        persona |= _UNAME26
    return persona


def is_native(system: str, settings: Settings) -> bool:
    """Whether builders for the system type SYSTEM run on the daemon's."""
    return system == settings.system or (system, settings.system) in (
        ("i686-linux", "x86_64-linux"),
        ("armhf-linux", "aarch64-linux"),
    )


def _platform_texts(derivation: Derivation, path: StorePath, settings: Settings) -> tuple[str, str]:
    """Return what to print instead of running the builder, and if the kernel cannot run it."""
    system = derivation.platform
    if is_native(system, settings):
        return "", ""
    text = (
        f"{UnsupportedPlatform(path, system).line}\n"
        f"error: a `{system}' is needed to build `{path}', but this is a `{settings.system}'"
    )
    if system.partition("-")[2] != settings.system.partition("-")[2]:
        return text, ""
    return "", text
