"""The file that a download is written to, hashed as it comes."""

from __future__ import annotations

import os
from collections.abc import Iterable

from guixd.build.diskspace import free_bytes
from guixd.build.job import Interest
from guixd.formats import hashes, nar
from guixd.formats.derivation import Output
from guixd.formats.references import Scanner
from guixd.store.dump import Measured
from guixd.store.links import end_key, start_key
from guixd.store.trees import hash_nar

_PART = ".part"


class Draft:
    """What has come so far of an output, in a directory that only the daemon can enter.

    Methods block for a moment; `write` may take longer, for a slow disk.

    :param hash_parts: what to look for in it.
    :ivar interest: who takes it away lets `write` and `finish` end with a `CancelledError`.
    :ivar size: bytes that are there.
    :ivar measured: of a finished file whose size was known in time: what `hash_and_scan`
        would find.
    """

    def __init__(
        self, directory: str, output: Output, executable: bool, hash_parts: Iterable[str]
    ) -> None:
        self.interest = Interest()
        self.measured: Measured | None = None
        self._hash_parts = frozenset(hash_parts)
        self._expected: int | None = None
        self._nar: hashes.Hash | None = None
        self._scanner = Scanner(())
        self.size = 0
        self._output = output
        self._executable = executable
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._base = output.path.base
        self._file = -1
        self._hash = hashes.new(output.hash_algorithm)

    def restart(self) -> None:
        """Begin anew, with nothing."""
        self._close_file()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        mode = 0o700 if self._executable else 0o600
        self._file = os.open(_PART, flags, mode, dir_fd=self._directory)
        self._hash = hashes.new(self._output.hash_algorithm)
        self._nar, self._expected, self.measured = None, None, None
        self.size = 0

    def expect(self, size: int | None) -> None:
        """Say that SIZE bytes are to come in all, as far as that is known."""
        if self.size == 0 and size is not None:
            self._expected = size
            self._nar = start_key(size, self._executable)
            self._scanner = Scanner(self._hash_parts)
        elif size != self._expected:
            self._nar = None

    def write(self, block: bytes) -> None:
        """Add BLOCK."""
        self.interest.check()
        view = memoryview(block)
        while view:
            view = view[os.write(self._file, view) :]
        if not self._output.is_recursive:
            self._hash.update(block)
        if self._nar is not None:
            self._nar.update(block)
            self._scanner.update(block)
        self.size += len(block)

    def finish(self) -> bytes:
        """Give the file the name of the output; return its hash, which may be wrong."""
        self._close_file()
        size, digest = self.size, b""
        if self._nar is not None and size == self._expected:
            archive = nar.file_size(size, self._executable)
            found = frozenset(self._scanner.found)
            self.measured = Measured(end_key(self._nar, size), archive, found)
        if self._output.is_recursive:
            if self.measured is not None and self._output.hash_algorithm == "sha256":
                digest = self.measured.digest
            else:
                hash_nar(self._directory, _PART, self._hash, self.interest.check)
        os.rename(_PART, self._base, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self.size = 0
        return digest or self._hash.digest()

    def free_bytes(self) -> int:
        """Return how many bytes more the file system takes."""
        return free_bytes(self._directory)

    def close(self) -> None:
        """Close it."""
        self._close_file()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
