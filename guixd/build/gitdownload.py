"""`builtin:git-download`: a Git commit's tree (spec: downloads §7).

Git deals with bytes from anywhere, so it runs as a build user does, in a box of its own
(`gitbox`).
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from urllib.parse import urlsplit

from guixd.build import gitbox, treebox
from guixd.build.container import Host
from guixd.build.downloadinputs import Refused, check_url, strings, variable
from guixd.build.job import Job
from guixd.build.results import BuildFailure, Status
from guixd.build.users import BuildUser
from guixd.formats.derivation import Derivation
from guixd.net.proxies import Proxies
from guixd.sandbox import kernel
from guixd.sandbox.spec import Ids, SandboxSpec

_ORDER = "GUIXD_ORDER"
"""The variable with what is to be done: unlike arguments, only who runs it can read it."""
_BOOT = f"""import json, os, sys, types
for name in "guixd", "guixd.sandbox", "guixd.build":
    sys.modules[name] = types.ModuleType(name)
for name, text in json.loads(sys.argv[1]):
    module = sys.modules[name] = types.ModuleType(name)
    package, _, own = name.rpartition(".")
    setattr(sys.modules[package], own, module)
    exec(text, module.__dict__)
module.main(os.environ.pop("{_ORDER}"))
"""
PLACES = "/run/current-system/profile/bin:/bin:/usr/bin"
"""Where Git is looked for besides the daemon's PATH."""
_SCHEMES = ("http", "https", "git")
_PERSONALITY = 0x0040000


@dataclass(frozen=True, slots=True)
class Commit:
    """What is to be checked out."""

    url: str
    commit: str
    recursive: bool
    methods: tuple[str, ...]


def read_commit(drv: Derivation) -> Commit:
    """Read the environment of DRV.

    :raises Refused: there is something wrong with it.
    """
    output = drv.outputs.get("out")
    if output is None or len(drv.outputs) != 1 or not output.is_recursive:
        raise Refused("only a derivation with one output whose recursive hash is known can do this")
    environment = drv.environment
    if "url" not in environment or not environment.get("commit"):
        raise Refused("the derivation has no 'url' or no 'commit'")
    (url, *others) = strings(variable(environment, "url"), "url") or ("",)
    if others or check_url(url) not in _SCHEMES:
        raise Refused("'url' is no URL that Git can fetch from here")
    commit = environment["commit"]
    if commit.startswith("-") or any(c <= " " or c == "\x7f" for c in commit):
        raise Refused("'commit' is no commit and no tag")
    recursive = "recursive?" in environment and variable(environment, "recursive?")
    methods: tuple[str, ...] = ("upstream", "nar", "swh")
    if "download-methods" in environment:
        value = variable(environment, "download-methods")
        methods = tuple(map(str, value)) if isinstance(value, tuple) else ()
    return Commit(url, commit, recursive is not False, methods)


def plan_checkout(job: Job, user: BuildUser | None, directory: str, host: Host) -> SandboxSpec:
    """Return how the checkout of JOB is made in DIRECTORY, under the base name of its output.

    :param user: who runs it; `None` for the daemon's own user.
    :raises BuildFailure: it cannot be made.
    """
    try:
        if user is None and host.uid == 0:
            raise Refused("Git is not run as root: the daemon needs '--build-users-group'")
        return _plan(read_commit(job.drv), job.drv, user, directory, host.environment)
    except Refused as error:
        fixed = job.drv.has_fixed_outputs
        status = Status.TRANSIENT_FAILURE if fixed else Status.PERMANENT_FAILURE
        raise BuildFailure(status, f"cannot build `{job.path}': {error}") from None


def plan_unpacking(
    job: Job, user: BuildUser | None, directory: str, host: Host, archive: str
) -> SandboxSpec:
    """Return how the file ARCHIVE in DIRECTORY becomes the output of JOB; see `plan_checkout`."""
    order = {**_order(read_commit(job.drv), job.drv, user, host.environment), "archive": archive}
    return in_box(order, (gitbox, treebox), user, directory)


def _plan(
    commit: Commit,
    drv: Derivation,
    user: BuildUser | None,
    directory: str,
    environ: Mapping[str, str],
) -> SandboxSpec:
    order = _order(commit, drv, user, environ)
    if "upstream" not in commit.methods:
        order["git"] = ""
    return in_box(order, (gitbox,), user, directory)


def _order(
    commit: Commit, drv: Derivation, user: BuildUser | None, environ: Mapping[str, str]
) -> dict[str, object]:
    """Return what programs in boxes are told."""
    git = shutil.which("git", path=f"{environ.get('PATH', '')}:{PLACES}") or ""
    proxies = Proxies.from_environment(environ)
    variables = {
        "http_proxy": proxies.http,
        "https_proxy": proxies.https,
        "no_proxy": ",".join(proxies.exceptions),
    }
    variables["PATH"] = f"{os.path.dirname(git)}:/usr/bin:/bin"
    if urlsplit(commit.url).username is None:
        variables["GIT_SSL_NO_VERIFY"] = "true"  # The tree is known by its hash.
    return {
        "url": commit.url,
        "commit": commit.commit,
        "recursive": commit.recursive,
        "git": git,
        "environment": variables,
        "out": drv.outputs["out"].path.base,
        "boxed": user is None,
    }


def in_box(
    order: Mapping[str, object],
    programs: Iterable[ModuleType],
    user: BuildUser | None,
    directory: str,
) -> SandboxSpec:
    """Return how the last of PROGRAMS, which needs the others, does what ORDER says."""
    modules = [(module.__name__, inspect.getsource(module)) for module in (kernel, *programs)]
    return SandboxSpec(
        program=sys.executable,
        arguments=("python3", "-I", "-X", "utf8", "-c", _BOOT, json.dumps(modules)),
        environment=(("PATH", "/usr/bin:/bin"), (_ORDER, json.dumps(order))),
        directory=directory,
        store="",
        ids=None if user is None else Ids(user.uid, user.gid, user.groups),
        personality=_PERSONALITY,
    )
