"""From what a builder left behind to verified store items (build.md §8).

Blocking: for a worker thread, after the last process of the build is dead.
Every name below the build's root is hostile and only reached by descriptors.
Outputs are first taken to a directory of the daemon's own, verified there, and
get their final names only when all of them are right.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

from guixd.build.results import BuildFailure, Status
from guixd.errors import BuildError, GuixdError, StoreError
from guixd.formats import hashes
from guixd.formats.derivation import Derivation, Output
from guixd.formats.path import StorePath
from guixd.formats.trace import HashMismatch
from guixd.store.trees import (
    InodesSeen,
    canonicalise,
    check_output,
    copy_fresh,
    dump,
    hash_and_scan,
    hash_file,
    remove,
    strip,
)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Made:
    """One output that is as it should be."""

    path: StorePath
    nar_hash: bytes
    nar_size: int
    references: frozenset[StorePath]


@dataclass(slots=True)
class Harvest:
    """The outputs of one build on their way into the store.

    :ivar store: the store directory.
    :ivar private: a directory in the store that only the daemon can enter, which
        takes the outputs; it is made if it is missing.
    :ivar open_source: opens the store directory that the builder wrote to.
    :ivar fresh: whether outputs are copied rather than moved, so that nobody can
        have a file of them open for writing (sandbox.md, I-FRESH).
    :ivar owner: the build user's uid; `None` if the builder ran as the daemon.
    :ivar wanted: the outputs by name.
    :ivar candidates: what the outputs may refer to.
    """

    drv: Derivation
    store: str
    private: str
    open_source: Callable[[], int]
    fresh: bool
    owner: int | None
    wanted: Mapping[str, Output]
    candidates: frozenset[StorePath]
    mismatches: list[str] = field(default_factory=list)
    """Trace lines to send before the failure."""
    _seen: InodesSeen = field(default_factory=set)

    def collect(self) -> tuple[Made, ...]:
        """Take and verify all wanted outputs, in the order of their names.

        :raises BuildFailure: an output is missing or wrong (output rejected).
        :raises GuixdError: a file of a type that cannot be stored; system trouble.
        """
        with _opened(self._open_private()) as staging, _opened(self._source()) as source:
            for name in sorted(self.wanted):
                self._take(source, staging, self.wanted[name].path)
            parts = {path.hash_part: path for path in self.candidates}
            made = tuple(
                self._verify(staging, name, self.wanted[name], parts)
                for name in sorted(self.wanted)
            )
        _check_order(made)
        return made

    def publish(self, made: tuple[Made, ...]) -> None:
        """Give the collected outputs their final names, all or none of them.

        :raises OSError: a rename failed; none has its final name then.
        """
        moved: list[str] = []
        with (
            _opened(self._open(self.private)) as staging,
            _opened(self._open(self.store)) as store,
        ):
            try:
                for output in made:
                    remove(store, output.path.base)
                    _move(staging, store, output.path.base)
                    moved.append(output.path.base)
            except OSError:
                for base in moved:
                    remove(store, base)
                raise

    def salvage(self) -> None:
        """Leave what a failed build made in the store, unregistered, to be looked at.

        Special permissions are taken away first.  A tree that cannot be made
        harmless is left out.
        """
        with _opened(self._open_private()) as staging, _opened(self._source()) as source:
            for output in self.wanted.values():
                base = output.path.base
                try:
                    _move(source, staging, base)
                    strip(staging, base)
                except (OSError, GuixdError):
                    continue
                with _opened(self._open(self.store)) as store:
                    remove(store, base)
                    _move(staging, store, base)

    # --- steps --------------------------------------------------------------

    @staticmethod
    def _open(directory: str) -> int:
        return os.open(directory, _DIRECTORY)

    def _open_private(self) -> int:
        try:
            os.mkdir(self.private, 0o700)
        except FileExistsError:
            pass
        return self._open(self.private)

    def _source(self) -> int:
        """Open the store directory that the builder wrote to."""
        try:
            return self.open_source()
        except StoreError as error:
            raise BuildFailure(Status.OUTPUT_REJECTED, error.text) from None

    def _take(self, source: int, staging: int, path: StorePath) -> None:
        base = path.base
        try:
            check_output(source, base, self.owner)
            if self.fresh:
                copy_fresh(source, base, staging, base)
                remove(source, base)
            else:
                _move(source, staging, base)
        except FileNotFoundError:
            raise BuildFailure(
                Status.OUTPUT_REJECTED, f"builder failed to produce output path `{path}'"
            ) from None
        except BuildError as error:
            raise BuildFailure(Status.OUTPUT_REJECTED, error.text) from None

    def _verify(
        self, staging: int, name: str, output: Output, parts: Mapping[str, StorePath]
    ) -> Made:
        base = output.path.base
        if output.is_fixed and not output.is_recursive:
            self._check_flat(staging, output)
        try:
            canonicalise(staging, base, self.owner, self._seen)
        except BuildError as error:
            raise BuildFailure(Status.OUTPUT_REJECTED, error.text) from None
        scanned = hash_and_scan(staging, base, parts)
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
            )

    def _check_hash(self, staging: int, output: Output, nar_digest: bytes) -> None:
        algorithm = output.hash_algorithm
        base = output.path.base
        if output.is_recursive:
            if algorithm == "sha256":
                actual = nar_digest
            else:
                running = hashes.new(algorithm)
                dump(staging, base, running.update)
                actual = running.digest()
        else:
            running = hashes.new(algorithm)
            hash_file(staging, base, running)
            actual = running.digest()
        expected = output.digest()
        if actual != expected:
            mismatch = HashMismatch(
                output.path,
                output.algorithm,
                _notation(expected, algorithm),
                _notation(actual, algorithm),
            )
            self.mismatches.append(mismatch.line)
            raise BuildFailure(
                Status.OUTPUT_REJECTED,
                f"{output.algorithm} hash mismatch for output path `{output.path}':"
                f" expected {mismatch.expected}, actual {mismatch.actual}",
            )


class _opened:  # noqa: N801
    """Closes a descriptor at the end of a `with` block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _check_order(made: tuple[Made, ...]) -> None:
    paths = {output.path for output in made}
    graph = {output.path: (output.references & paths) - {output.path} for output in made}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise BuildFailure(
            Status.OUTPUT_REJECTED, f"cycle detected in the references of `{error.args[1][0]}'"
        ) from None


def _notation(digest: bytes, algorithm: str) -> str:
    return digest.hex() if algorithm == "md5" else hashes.to_base32(digest)


def _move(source: int, target: int, base: str) -> None:
    """Rename BASE from one directory to another; as a plain user that may need its mode."""
    status = os.stat(base, dir_fd=source, follow_symlinks=False)
    closed = stat.S_ISDIR(status.st_mode) and not status.st_mode & stat.S_IWUSR
    if not closed or os.geteuid() == 0:
        os.rename(base, base, src_dir_fd=source, dst_dir_fd=target)
        return
    with _opened(os.open(base, _DIRECTORY, dir_fd=source)) as fd:
        os.fchmod(fd, 0o700)
        try:
            os.rename(base, base, src_dir_fd=source, dst_dir_fd=target)
        finally:
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
