"""The file that a download is written to, hashed as it comes."""

from __future__ import annotations

import os

from guixd.formats import hashes
from guixd.formats.derivation import Output
from guixd.store.trees import dump

_PART = ".part"


class Draft:
    """What has come so far of an output, in a directory that only the daemon can enter.

    Methods block for a moment; `write` may take longer, for a slow disk.

    :ivar size: bytes that are there.
    """

    def __init__(self, directory: str, output: Output, executable: bool) -> None:
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
        self.size = 0

    def write(self, block: bytes) -> None:
        """Add BLOCK."""
        view = memoryview(block)
        while view:
            view = view[os.write(self._file, view) :]
        if not self._output.is_recursive:
            self._hash.update(block)
        self.size += len(block)

    def finish(self) -> bytes:
        """Give the file the name of the output; return its hash, which may be wrong."""
        self._close_file()
        if self._output.is_recursive:
            dump(self._directory, _PART, self._hash.update)
        os.rename(_PART, self._base, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self.size = 0
        return self._hash.digest()

    def free_bytes(self) -> int:
        """Return how many bytes more the file system takes."""
        status = os.fstatvfs(self._directory)
        return status.f_bavail * status.f_frsize

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
