"""Checking a Git commit out, in a box with the network and little else (spec: downloads §7).

A program of its own, run by the build user or, without root, by the daemon's user; see
`guixd.build.gitdownload`.  It needs only the standard library and `kernel`, and these
without any file: both come as texts.  Before it runs Git it enters new user, mount and
process namespaces, in which there is nothing of the machine but programs, libraries and
certificates, read-only, and the directory it works in.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from guixd.sandbox import kernel

WORK = "/checkout"
"""The working directory inside."""
_SHOWN = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/gnu/store", "/nix/store",
    "/run/current-system", "/etc/ssl", "/etc/ca-certificates", "/etc/pki", "/etc/static",
    "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/services", "/etc/ld.so.cache",
    "/dev/null", "/dev/zero", "/dev/urandom",
)  # fmt: skip
_CONFIGURATION = """[protocol "file"]
\tallow = never
[core]
\thooksPath = /dev/null
\tfsmonitor = false
\tautocrlf = false
[advice]
\tdetachedHead = false
[submodule]
\tfetchJobs = 4
"""
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


def main(text: str) -> NoReturn:
    """Do what the JSON TEXT says; exit with 0 when the checkout is complete.

    `url`, `commit`, `recursive`, `git` (the program), `environment`, `out` (made in the
    working directory), `boxed` (whether it may not go on without a box).
    """
    order: dict[str, Any] = json.loads(text)
    if not order["git"]:
        print("not trying Git, which is not there or not wanted", flush=True)
        sys.exit(1)
    git = Git(order, enter(order))
    try:
        _check_out(git, order)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", flush=True)
        shutil.rmtree(order["out"], ignore_errors=True)
        sys.exit(1)
    sys.exit(0)


class Git:
    """Runs Git in the tree that is to be the output, with nothing else that it reads.

    :ivar tree: the name of the tree.
    """

    def __init__(self, order: Mapping[str, Any], where: str) -> None:
        self.tree = f"{where}/{order['out']}"
        self._program: str = order["git"]
        home = f"{where}/home"
        os.makedirs(home, exist_ok=True)
        configuration = f"{home}/configuration"
        with open(configuration, "w") as file:  # noqa: PTH123
            file.write(_CONFIGURATION)
        self._environment = {
            **order["environment"],
            "HOME": home,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": configuration,
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ALLOW_PROTOCOL": "https:http:git",
            "LC_ALL": "C",
        }

    def run(self, *arguments: str) -> None:
        """Run a command, whose output goes to the log.

        :raises subprocess.CalledProcessError: it fails.
        """
        self._run(arguments, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)

    def ask(self, *arguments: str, data: str) -> str:
        """Return what a command prints that reads DATA; it may fail likewise."""
        done = self._run(arguments, input=os.fsencode(data), stdout=subprocess.PIPE)
        return os.fsdecode(done.stdout)

    def succeeds(self, *arguments: str) -> bool:
        """Run a command; return whether it succeeds."""
        try:
            self.run(*arguments)
        except subprocess.CalledProcessError:
            return False
        return True

    def _run(self, arguments: Sequence[str], **more: Any) -> subprocess.CompletedProcess[bytes]:
        command = [self._program, *arguments]
        done = subprocess.run(command, check=False, cwd=self.tree, env=self._environment, **more)
        if done.returncode:  # URLs among the arguments may have passwords.
            raise subprocess.CalledProcessError(done.returncode, f"git {arguments[0]}")
        return done


def _check_out(git: Git, order: Mapping[str, Any]) -> None:
    """Make the tree.

    :raises OSError: or `subprocess.CalledProcessError`: it cannot be had.
    """
    commit = order["commit"]
    os.mkdir(git.tree)
    git.run("init", "--quiet", "--initial-branch=main")
    git.run("remote", "add", "--", "origin", order["url"])
    if git.succeeds("fetch", "--quiet", "--depth", "1", "--", "origin", commit):
        git.run("checkout", "--quiet", "FETCH_HEAD")
    else:
        print("fetching the whole history, as a part of it cannot be had", flush=True)
        git.run("fetch", "--quiet", "--tags", "--", "origin")
        git.run("checkout", "--quiet", commit, "--")
    if order["recursive"]:
        git.run("submodule", "--quiet", "update", "--init", "--recursive")
    for directory, directories, files in os.walk(git.tree, topdown=True):
        if ".git" in files:
            os.unlink(f"{directory}/.git")
        if ".git" in directories:
            directories.remove(".git")
            shutil.rmtree(f"{directory}/.git")


# The box.


def enter(order: Mapping[str, Any], more: int = 0) -> str:
    """Go on in the box, if there can be one; return the working directory there.

    :param more: other namespaces to be in.
    """
    os.umask(0o022)
    where = os.getcwd()
    try:
        _enter_namespaces(more)
    except OSError as error:
        if order["boxed"]:
            print(f"error: cannot confine Git: {error}", flush=True)
            sys.exit(1)
    else:
        names = [name for name in (order["git"], order.get("assembler")) if name]
        programs = [os.path.dirname(os.path.dirname(os.path.realpath(name))) for name in names]
        _enter_box(where, programs)
        where = WORK
    os.chdir(where)
    _set(_PR_SET_NO_NEW_PRIVS, 1)
    return where


def _enter_namespaces(more: int) -> None:
    uid, gid = os.getuid(), os.getgid()
    own = kernel.NEWNS | kernel.NEWPID | kernel.NEWIPC | kernel.NEWUTS
    kernel.unshare(kernel.NEWUSER | own | more)
    kernel.write_file("/proc/self/setgroups", "deny")
    kernel.write_file("/proc/self/uid_map", f"{uid} {uid} 1")
    kernel.write_file("/proc/self/gid_map", f"{gid} {gid} 1")


def _enter_box(where: str, programs: Sequence[str]) -> None:
    """Go on in a new process in the box; this one waits for that and ends like it."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _set(_PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    working = os.open(where, os.O_PATH | os.O_DIRECTORY)
    shown = {name: os.open(name, os.O_PATH) for name in (*_SHOWN, *programs) if _is_plain(name)}
    links = {name: os.readlink(name) for name in _SHOWN if os.path.islink(name)}
    new = "/tmp"
    kernel.mount("guixd-git", new, "tmpfs", 0, "mode=755,size=1m")
    _mount_at(working, new + WORK, read_only=False)
    for name, opened in shown.items():
        if not os.path.lexists(new + name):
            _mount_at(opened, new + name, read_only=True)
    for name, target in links.items():
        os.makedirs(os.path.dirname(new + name), exist_ok=True)
        os.symlink(target, new + name)
    os.mkdir(new + "/proc")
    kernel.mount("none", new + "/proc", "proc")
    os.makedirs(new + "/tmp", exist_ok=True)
    os.chmod(new + "/tmp", 0o1777)
    os.chdir(new)
    kernel.pivot_root(".", ".")
    kernel.umount(".", kernel.MNT_DETACH)
    os.chdir("/")


def _is_plain(name: str) -> bool:
    return os.path.exists(name) and not os.path.islink(name)


def _mount_at(opened: int, target: str, *, read_only: bool) -> None:
    source = f"/proc/self/fd/{opened}"
    if stat.S_ISDIR(os.fstat(opened).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    kernel.mount(source, target, "", kernel.MS_BIND | kernel.MS_REC)
    if read_only:
        kernel.make_read_only(target)
    os.close(opened)


def _set(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
