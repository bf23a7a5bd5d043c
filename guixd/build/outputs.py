"""From what a builder left behind to verified store items (spec: build §8).

For a time after the last process of the build is dead.  All of it blocks, and is
for a worker thread unless `Harvest.is_small`.
Every name below the build's root is hostile and only reached by descriptors.
Outputs are first taken to a directory of the daemon's own, verified there, and
get their final names only when all of them are right.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Self

from guixd.build.results import BuildFailure, Status
from guixd.build.targets import Targets
from guixd.errors import BuildError, GuixdError, StoreError
from guixd.faults import reached
from guixd.formats import hashes
from guixd.formats.derivation import Derivation, Output
from guixd.formats.path import StorePath
from guixd.formats.trace import HashMismatch
from guixd.store.descent import Check, go_on
from guixd.store.dump import Measured
from guixd.store.finding import find_reference
from guixd.store.links import Links, is_shared
from guixd.store.moves import exchange, exists, move
from guixd.store.rewriting import rewrite
from guixd.store.trees import (
    InodesSeen,
    canonicalise,
    check_output,
    copy_fresh,
    hash_and_scan,
    hash_file,
    hash_nar,
    remove,
    strip,
)

SMALL = 64 << 10
"""Bytes of outputs that are quickly hashed."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_REWRITTEN = ".rewritten"
CHECK = "-check"
"""Appended to the name of an output that differs from what it should be the same as."""


@dataclass(frozen=True, slots=True)
class Made:
    """One output that is as it should be."""

    path: StorePath
    nar_hash: bytes
    nar_size: int
    references: frozenset[StorePath]


@dataclass(frozen=True, slots=True)
class Known:
    """What was found out about an output while the daemon itself wrote it."""

    measured: Measured
    fixed: bytes
    """Its hash, as that of a fixed output is reckoned."""


@dataclass(slots=True)
class Harvest:
    """The outputs of one build on their way into the store; to be used in a `with` block.

    Entering it raises `BuildFailure` (output rejected) if the builder has replaced the
    directories above its outputs.

    :ivar deriver: the derivation that is built.
    :ivar store: the store directory.
    :ivar private: a directory in the store that only the daemon can enter, which
        takes the outputs; it is made if it is missing.
    :ivar open_source: opens the store directory that the builder wrote to.
    :ivar fresh: whether outputs are copied rather than moved, so that nobody can
        have a file of them open for writing (spec: sandbox I-FRESH).
    :ivar owner: the build user's uid; `None` if the builder ran as the daemon.
    :ivar targets: the outputs, and where they are.
    :ivar candidates: what the outputs may refer to.
    """

    deriver: StorePath
    drv: Derivation
    store: str
    private: str
    open_source: Callable[[], int]
    fresh: bool
    owner: int | None
    targets: Targets
    candidates: frozenset[StorePath]
    links: Links | None = None
    """Where files are shared with equal ones of the store; closed in the end."""
    known: Mapping[StorePath, Known] = field(default_factory=dict)
    """What need not be found out again."""
    check: Check = go_on
    """Called in the threads after each step; it raises when nobody wants the outputs any more."""
    mismatches: list[HashMismatch] = field(default_factory=list)
    """What is to be told before the failure."""
    _seen: InodesSeen = field(default_factory=set)
    _opened: list[int] = field(default_factory=list)
    _staging: int = -1
    _source: int = -1
    _target: int = -1

    def __enter__(self) -> Self:
        try:
            self._staging = self._keep(_make_private(self.private))
            self._source = self._keep(self.open_source())
            self._target = self._keep(os.open(self.store, _DIRECTORY))
        except BaseException as error:
            self.__exit__()
            if isinstance(error, StoreError):
                raise BuildFailure(Status.OUTPUT_REJECTED, error.text) from None
            raise
        return self

    def _keep(self, fd: int) -> int:
        self._opened.append(fd)
        return fd

    def __exit__(self, *_: object) -> None:
        for fd in self._opened:
            os.close(fd)
        self._opened.clear()
        if self.links is not None:
            self.links.close()

    def is_small(self) -> bool:
        """Whether the other methods take but a moment; a directory may hold anything."""
        size = 0
        if self.targets.taken:
            return False
        for output in self.targets.wanted.values():
            base = output.path.base
            try:
                status = os.stat(base, dir_fd=self._source, follow_symlinks=False)
            except OSError:
                continue  # which `collect` finds, too
            if stat.S_ISDIR(status.st_mode) or self._has_another(base, status):
                return False
            size += status.st_size
        return size <= SMALL

    def _has_another(self, base: str, status: os.stat_result) -> bool:
        """Whether something else than STATUS lies in the store, to be removed."""
        try:
            there = os.stat(base, dir_fd=self._target, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return not os.path.samestat(there, status)

    def take_in(self) -> tuple[Made, ...]:
        """Do `collect` and `publish` in one step, as each change of threads costs time."""
        made = self.collect()
        self.publish(made)
        return made

    def collect(self) -> tuple[Made, ...]:
        """Take and verify all wanted outputs, in the order of their names.

        :raises BuildFailure: an output is missing or wrong (output rejected).
        :raises GuixdError: a file of a type that cannot be stored; system trouble.
        """
        outputs = [output for _, output in sorted(self.targets.wanted.items())]
        for output in outputs:
            self._take(output.path)
            reached("outputs.taken")
        parts = {path.hash_part: path for path in self.candidates}
        made = tuple(self._verify(output, parts) for output in outputs)
        reached("outputs.verified")
        if len(made) > 1:
            _check_order(made)
        return made

    def publish(self, made: tuple[Made, ...]) -> None:
        """Give the collected outputs their final names, all or none of them.

        :raises OSError: a rename failed; none has its final name then.
        """
        moved: list[str] = []
        try:
            for output in made:
                base = output.path.base
                if exists(self._target, base):
                    remove(self._target, base)
                move(self._staging, base, self._target, base)
                moved.append(base)
                reached("outputs.moved")
        except OSError:
            for base in moved:
                remove(self._target, base)
            raise

    def replace(self, made: tuple[Made, ...]) -> None:
        """Put the collected outputs in place of what has their names, each in one step.

        :raises OSError: a rename failed; what is not replaced yet stays.
        """
        for output in made:
            base = output.path.base
            if not exists(self._target, base):
                move(self._staging, base, self._target, base)
            elif not exchange(self._staging, base, self._target, base):
                remove(self._target, base)
                move(self._staging, base, self._target, base)
            reached("repair.exchanged")

    def locate(self, output: StorePath, reference: StorePath) -> str:
        """Return the file of the collected OUTPUT that has REFERENCE in it; empty if unknown."""
        try:
            return find_reference(self._staging, output.base, reference.hash_part, self.check)
        except (OSError, GuixdError):
            return ""

    def set_aside(self, paths: Iterable[StorePath]) -> None:
        """Keep the collected outputs PATHS in the store under other names, to be looked at.

        :raises OSError: a rename failed.
        """
        for path in paths:
            remove(self._target, path.base + CHECK)
            move(self._staging, path.base, self._target, path.base + CHECK)

    def salvage(self) -> None:
        """Leave what a failed build made in the store, unregistered, to be looked at.

        Special permissions are taken away first.  A tree that cannot be made
        harmless is left out.
        """
        for path in self.targets.free:
            base = path.base
            try:
                move(self._source, base, self._staging, base)
                strip(self._staging, base, pipes=False, check=self.check)
                reached("outputs.stripped")
            except (OSError, GuixdError):
                continue
            remove(self._target, base)
            move(self._staging, base, self._target, base)

    # --- steps --------------------------------------------------------------

    def _take(self, path: StorePath) -> None:
        source, staging, base = self._source, self._staging, path.base
        there = self.targets.elsewhere.get(path, path).base
        try:
            check_output(source, there, self.owner)
            if self.fresh:
                copy_fresh(source, there, staging, base, self.check)
                remove(source, there)
            else:
                move(source, there, staging, base)
        except FileNotFoundError:
            raise BuildFailure(
                Status.OUTPUT_REJECTED,
                f"builder for `{self.deriver}' failed to produce output path `{path}'",
                in_log=True,
            ) from None
        except BuildError as error:
            raise BuildFailure(Status.OUTPUT_REJECTED, error.text) from None

    def _verify(self, output: Output, parts: Mapping[str, StorePath]) -> Made:
        staging, base = self._staging, output.path.base
        if output.is_fixed and not output.is_recursive:
            self._check_flat(staging, output)
        try:
            canonicalise(staging, base, self.owner, self._seen, self.check)
        except BuildError as error:
            raise BuildFailure(Status.OUTPUT_REJECTED, error.text) from None
        if self.targets.elsewhere:
            rewrite(staging, base, _REWRITTEN, self.targets.backward, self.check)
            remove(staging, base)
            move(staging, _REWRITTEN, staging, base)
        known = self.known.get(output.path)
        if known is None:
            scanned = hash_and_scan(staging, base, parts, self.links, self.check)
        else:
            scanned = known.measured
            status = os.stat(base, dir_fd=staging, follow_symlinks=False)
            if self.links is not None and is_shared(status):
                self.links.share(staging, base, scanned.digest, status)
        if output.is_fixed:
            self._check_hash(staging, output, scanned.digest)
        return Made(
            output.path,
            scanned.digest,
            scanned.size,
            frozenset(parts[part] for part in scanned.found),
        )

    @staticmethod
    def _check_flat(staging: int, output: Output) -> None:
        status = os.stat(output.path.base, dir_fd=staging, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or status.st_mode & stat.S_IXUSR:
            raise BuildFailure(
                Status.OUTPUT_REJECTED,
                f"output path `{output.path}' should be a non-executable regular file",
                "its hash is that of a file; a hash of kind `r:' is for any other output",
            )

    def _check_hash(self, staging: int, output: Output, nar_digest: bytes) -> None:
        algorithm = output.hash_algorithm
        base = output.path.base
        if output.path in self.known:
            actual = self.known[output.path].fixed
        elif output.is_recursive:
            if algorithm == "sha256":
                actual = nar_digest
            else:
                running = hashes.new(algorithm)
                hash_nar(staging, base, running, self.check)
                actual = running.digest()
        else:
            running = hashes.new(algorithm)
            hash_file(staging, base, running, self.check)
            actual = running.digest()
        expected = output.digest()
        if actual != expected:
            mismatch = HashMismatch(
                output.path,
                output.algorithm,
                _notation(expected, algorithm),
                _notation(actual, algorithm),
            )
            self.mismatches.append(mismatch)
            raise BuildFailure(
                Status.OUTPUT_REJECTED,
                f"hash mismatch for store item `{output.path}'",
                "if this is what it should be, the derivation has to say the actual hash;"
                " else what it was made from has changed",
            )


def _make_private(directory: str) -> int:
    try:
        return os.open(directory, _DIRECTORY)
    except FileNotFoundError:
        os.mkdir(directory, 0o700)
        return os.open(directory, _DIRECTORY)


def _check_order(made: tuple[Made, ...]) -> None:
    paths = {output.path for output in made}
    graph = {output.path: (output.references & paths) - {output.path} for output in made}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]
        way = ", which refers to ".join(f"`{path}'" for path in circle[1:])
        raise BuildFailure(
            Status.OUTPUT_REJECTED,
            f"cycle detected in the references of `{circle[0]}': it refers to {way}",
        ) from None


def _notation(digest: bytes, algorithm: str) -> str:
    return digest.hex() if algorithm == "md5" else hashes.to_base32(digest)
