"""Unpacking an archive of a directory, in a box without the network (spec: downloads §7, §8).

A program like `gitbox`, and run like it.  The archive may be anybody's: names lead nowhere
but below the output, and there are only directories, files and symbolic links in it.
What the archive has is what Git keeps; `.gitattributes` says what a checkout makes of it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from guixd.build import gitbox
from guixd.sandbox import kernel

MOST_ENTRIES = 4_000_000
MOST_BYTES = 64 << 30
DEEPEST = 256
_MOST_MEMORY = 4 << 30
_LONGEST_NAME = 255
_PIECE = 1 << 20
_TREE = "tree"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


_ERRORS = (OSError, EOFError, ValueError, MemoryError, tarfile.TarError, zlib.error)
"""What garbage leads to."""


class BadTree(ValueError):
    """The archive is not one of a directory."""


def main(text: str) -> NoReturn:
    """Do what the JSON TEXT says; exit with 0 when the tree is complete.

    `archive`, a tar file compressed by gzip in the working directory, whose only directory
    becomes `out`; `git` (the program, may be empty), `environment`, `boxed`, see `gitbox`.
    With `assembler` (a program) and `specification` (a file) `out` is what it makes of both.
    """
    order: dict[str, Any] = json.loads(text)
    where = gitbox.enter(order, kernel.NEWNET)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    try:
        if order.get("assembler"):
            unpack(order["archive"], _TREE)
            assemble(order, where)
        else:
            unpack(order["archive"], order["out"])
        if order["git"] and _has_attributes(order["out"]):
            apply_attributes(gitbox.Git(order, where))
    except (*_ERRORS, subprocess.CalledProcessError) as error:
        print(f"error: {error}", flush=True)
        shutil.rmtree(order["out"], ignore_errors=True)
        sys.exit(1)
    sys.exit(0)


def assemble(order: Mapping[str, Any], where: str) -> None:
    """Let the assembler make the output of the tree and the specification.

    :raises OSError: or `subprocess.CalledProcessError`: it cannot.
    """
    arguments = ("assemble", _TREE, order["specification"], "-o", order["out"])
    environment = {**order["environment"], "HOME": where, "LC_ALL": "C.UTF-8"}
    subprocess.run(
        [order["assembler"], *arguments],
        check=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )


def _has_attributes(tree: str) -> bool:
    return any(".gitattributes" in files for _, _, files in os.walk(tree))


def unpack(archive: str, out: str) -> None:
    """Make the directory OUT of what is in the only directory of the file ARCHIVE.

    :raises BadTree: or `OSError`, `tarfile.TarError`: that is not possible.
    """
    top, entries, left = "", 0, MOST_BYTES
    os.mkdir(out, 0o755)
    root = os.open(out, _DIRECTORY)
    try:
        with tarfile.open(archive, "r|gz", errors="surrogateescape") as tar:
            for member in tar:
                entries, left = entries + 1, left - member.size
                if entries > MOST_ENTRIES or left < 0 or member.size < 0:
                    raise BadTree("the archive is too large")
                first, *names = _names(member.name)
                top = top or first
                if first != top:
                    raise BadTree("the archive has more than one directory")
                _unpack_one(tar, member, root, names)
                setattr(tar, "members", [])  # noqa: B010  It would remember all of them.
        if not top:
            raise BadTree("the archive is empty")
    finally:
        os.close(root)


def _names(name: str) -> list[str]:
    """Return the parts of NAME, which must not lead upwards."""
    names = name.removeprefix("./").rstrip("/").split("/")
    for each in names:
        size = len(os.fsencode(each))
        if each in ("", ".", "..") or "\0" in each or size > _LONGEST_NAME or each == ".git":
            raise BadTree(f"the archive has an entry with the name {name!r}")
    if len(names) > DEEPEST:
        raise BadTree("the archive has too deep a directory")
    return names


def _unpack_one(tar: tarfile.TarFile, member: tarfile.TarInfo, root: int, names: list[str]) -> None:
    if not names:
        if not member.isdir():
            raise BadTree("the archive is not one of a directory")
        return
    above = os.dup(root)
    try:
        for name in names[:-1]:
            above = _go_down(above, name)
        if member.isdir():
            above = _go_down(above, names[-1])
        elif member.issym():
            os.symlink(member.linkname, names[-1], dir_fd=above)
        elif member.isreg():
            _write(tar, member, os.open(names[-1], _CREATE, 0o600, dir_fd=above))
        else:
            raise BadTree(f"the archive has a special file, {member.name!r}")
    finally:
        os.close(above)


def _go_down(above: int, name: str) -> int:
    """Return the directory NAME below ABOVE, which is closed; made if it is not there."""
    try:
        os.mkdir(name, 0o755, dir_fd=above)
    except FileExistsError:
        pass
    below = os.open(name, _DIRECTORY, dir_fd=above)
    os.close(above)
    return below


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, descriptor: int) -> None:
    with os.fdopen(descriptor, "wb") as file:
        source = tar.extractfile(member)
        assert source is not None
        left = member.size
        while left:
            piece = source.read(min(left, _PIECE))
            if not piece:
                raise BadTree("the archive is incomplete")
            file.write(piece)
            left -= len(piece)
        os.fchmod(descriptor, 0o755 if member.mode & stat.S_IXUSR else 0o644)


def apply_attributes(git: gitbox.Git) -> None:
    """Make of the files what a checkout by Git would.

    They go into an index as they are, without what Git does to files that are added.

    :raises OSError: or `subprocess.CalledProcessError`: Git cannot.
    """
    git.run("init", "--quiet")
    try:
        files = list(_plain_files(git.tree))
        names = "".join(f"{path}\n" for _, path in files)
        ids = git.ask("hash-object", "-w", "--no-filters", "--stdin-paths", data=names).split()
        entries = [f"{mode} {id}\t{path}\0" for (mode, path), id in zip(files, ids, strict=True)]
        git.ask("update-index", "-z", "--index-info", data="".join(entries))
        git.run("checkout-index", "--quiet", "--all", "--force")
    finally:
        shutil.rmtree(f"{git.tree}/.git", ignore_errors=True)


def _plain_files(tree: str) -> Iterator[tuple[str, str]]:
    """Yield the modes for Git and the names of regular files in TREE that Git can be told of."""
    for directory, _, files in os.walk(tree):
        for name in files:
            status = os.lstat(f"{directory}/{name}")
            path = os.path.relpath(f"{directory}/{name}", tree)
            if stat.S_ISREG(status.st_mode) and "\n" not in path and path[0] != '"':
                yield "100755" if status.st_mode & stat.S_IXUSR else "100644", path
