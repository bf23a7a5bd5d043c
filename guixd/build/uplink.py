"""The network of builds with a fixed output, by way of slirp4netns (spec: sandbox §7).

slirp4netns runs in a container of its own, as who runs the builder, and sees nothing of
the machine but programs, libraries and the names of its name servers.  The packets of the
build's device are all that it gets of the build.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from guixd.errors import GuixdError
from guixd.sandbox.spec import Base, Bind, File, SandboxSpec, Uplink
from guixd.uplink.devices import DEVICE, LINK, NAME_SERVER, ROUTER, ROUTER6, TAP
from guixd.uplink.filter import filter_for

_log = Logger()

PROGRAM = "slirp4netns"
_SHOWN = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/gnu/store", "/nix/store",
    "/etc/ld.so.cache", "/etc/resolv.conf", "/etc/hosts",
)  # fmt: skip
_DEVICES = "/dev/null", "/dev/urandom"
_LOOPBACK = re.compile(r"(?<![\w.:])(127\.0\.0\.1|::1)(?![\w.:])")
_GLOBAL_SCOPES = "00", "40"
_MOST_TEXT = 500


class NoUplink(GuixdError):
    """A build cannot have a network on this machine."""

    reason = "no-network"


def connect(
    spec: SandboxSpec, environ: Mapping[str, str], machine: str, isolated: bool
) -> SandboxSpec:
    """Return SPEC, of a build without network, with one; reads files of any size.

    :param environ: its `PATH` is where slirp4netns is looked for.
    :param machine: as uname(2) names it.
    :param isolated: whether the machine's loopback cannot be reached.
    :raises NoUplink: it cannot have one.
    """
    program = shutil.which(PROGRAM, path=environ.get("PATH", os.defpath))
    seccomp = filter_for(machine)
    if program is None:
        raise NoUplink(f"there is no '{PROGRAM}' in PATH")
    if not os.path.exists(DEVICE):
        raise NoUplink(f"there is no '{DEVICE}'")
    if not seccomp:
        raise NoUplink(f"there is no filter of system calls for {machine}")
    if spec.user_namespace is not None and spec.user_namespace.host_uid == 0:
        raise NoUplink(f"'{PROGRAM}' is not run as root")
    options = ("--disable-host-loopback",) if isolated else ()
    made = {"/etc/resolv.conf": f"nameserver {NAME_SERVER}"}
    if not isolated:
        made["/etc/hosts"] = _hosts()
    own = (File(name, "file", 0o644, text) for name, text in made.items())
    return replace(
        spec,
        files=(*spec.files, *own),
        # Those of the administrator are not optional.
        binds=tuple(bind for bind in spec.binds if not (bind.target in made and bind.optional)),
        uplink=Uplink(
            _jail(spec, os.path.realpath(program), options, seccomp),
            ipv6=_has_ipv6(),
            localnet=not isolated,
        ),
    )


def _jail(spec: SandboxSpec, program: str, options: tuple[str, ...], seccomp: bytes) -> SandboxSpec:
    """Return what slirp4netns sees; the root directory is the build's, with nothing in it."""
    shown = [*_SHOWN, *_DEVICES]
    directory = os.path.dirname(program)
    if not any(directory == name or directory.startswith(name + "/") for name in _SHOWN):
        shown.append(directory)
    binds = (
        Bind(os.path.realpath(name) if name.startswith("/etc/") else name, name, optional=True)
        for name in sorted(shown)
    )
    fixed = "--netns-type=tapfd", "--enable-ipv6", f"--ready-fd={LINK}"
    user = spec.user_namespace
    return SandboxSpec(
        program=program,
        arguments=(PROGRAM, *fixed, *options, str(TAP)),
        environment=(),
        directory="/",
        store="",
        base=None if spec.base is None else Base(spec.base.root, spec.base.gid),
        binds=tuple(binds),
        mounts=("/proc",),
        ids=None if spec.ids is None else replace(spec.ids, groups=()),
        user_namespace=None if user is None else replace(user, kvm_gid=None),
        personality=0,
        filter=seccomp,
    )


def _hosts() -> str:
    """Return the host names of this machine for a build."""
    try:
        text = Path("/etc/hosts").read_text("utf-8", "surrogateescape")
    except OSError:
        text = "127.0.0.1 localhost\n::1 localhost\n"
    return reached_by_router(text)


def reached_by_router(hosts: str) -> str:
    """Return the contents of a file HOSTS for who reaches the machine's loopback by a router."""
    routers = {"127.0.0.1": ROUTER, "::1": ROUTER6}
    return _LOOPBACK.sub(lambda found: routers[found[0]], hosts)


def _has_ipv6() -> bool:
    """Whether this machine has an IPv6 address that others can reach."""
    try:
        lines = Path("/proc/net/if_inet6").read_text("ascii").splitlines()
    except OSError:
        return False
    return any(line.split()[3] in _GLOBAL_SCOPES for line in lines)


class UplinkProtocol(ProcessProtocol):
    """A slirp4netns that runs, or is about to.

    :ivar ended: fires with None when nothing of it is left.
    :ivar wanted: whether its end would be too early.
    """

    def __init__(self) -> None:
        self.ended: Deferred[None] = Deferred()
        self.wanted = True
        self._text = b""
        self._process: Any = None

    def watch(self, process: Any) -> None:
        """Go with the `BuilderProcess` PROCESS, which is about to start."""
        self._process = process
        process.set_up.addErrback(self._over)

    def end(self) -> Deferred[None]:
        """Kill it; return `ended`."""
        self.wanted = False
        try:
            self._process.signalProcess("KILL")
        except ProcessExitedAlready:
            pass
        return self.ended

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._text += data
        if len(self._text) > _MOST_TEXT:
            self._process.loseConnection()  # It could go on like this for ever.

    def processEnded(self, reason: Failure) -> None:
        self._over(reason)

    def _over(self, reason: Failure) -> None:
        if self.wanted:
            text = self._text[:_MOST_TEXT].decode("utf-8", "replace").strip()
            why = reason.getErrorMessage()
            _log.info("{program}: {why} {text}", program=PROGRAM, why=why, text=text)
        self.ended.callback(None)
