"""Derivations that were read, as many as are worth their memory; and how they are read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping

from guixd.errors import StoreError
from guixd.formats import derivation
from guixd.formats.derivation import MAXIMUM_SIZE, Derivation
from guixd.formats.path import StoreDirectory, StorePath

SMALL = 256 << 10
"""Bytes of the largest derivation that is read in the reactor's thread."""
_MOST = 4096
_MOST_TEXT = 32 << 20  # bytes; what was read takes ten times as much
_LARGEST = 4 << 20
_MOST_MAPPINGS = 1 << 15
_MOST_OUTPUTS = 16  # those of larger ones are left to the database
_MOST_READS = 200
_COST_OF_READING = 10
Read = Callable[[StorePath], Derivation]


class Derivations:
    """The derivations of one store, those read last in memory.

    The name of a derivation is a hash of its contents, so that nothing gets stale.
    """

    def __init__(self, directory: StoreDirectory) -> None:
        self._directory = directory
        self._known: dict[StorePath, Derivation] = {}
        self._sizes: dict[StorePath, int] = {}
        self._size = 0
        self._outputs: dict[StorePath, Mapping[str, StorePath]] = {}
        self._lock = threading.Lock()

    def known(self, path: StorePath) -> Derivation | None:
        """Return the derivation PATH if it is in memory."""
        return self._known.get(path)

    def outputs(self, path: StorePath) -> Mapping[str, StorePath] | None:
        """Return the outputs of the derivation PATH by name, if they are in memory."""
        return self._outputs.get(path)

    def read(self, path: StorePath) -> Derivation:
        """Return the derivation PATH, from its file if need be; may be called in a thread.

        :raises BadDerivation: it is no derivation.
        :raises StoreError: it cannot be read.
        """
        return self._known.get(path) or self._load(path)

    def _load(self, path: StorePath) -> Derivation:
        text = contents(path)
        drv = derivation.parse(text, self._directory, path)
        self.remember(path, drv, len(text))
        return drv

    def takes_long(self, path: StorePath) -> bool:
        """Whether `read` would keep the reactor for long."""
        if path in self._known:
            return False
        try:
            return os.lstat(path).st_size > SMALL
        except OSError:
            return False  # which `read` finds, too

    def remember(self, path: StorePath, drv: Derivation, size: int) -> None:
        """Keep DRV, which is right and has a text of SIZE bytes, and only its outputs if large."""
        with self._lock:
            if path not in self._outputs and len(drv.outputs) <= _MOST_OUTPUTS:
                if len(self._outputs) >= _MOST_MAPPINGS:
                    del self._outputs[next(iter(self._outputs))]
                outputs = {name: output.path for name, output in drv.outputs.items()}
                self._outputs[path] = outputs
            if size > _LARGEST or path in self._known:
                return
            while self._size + size > _MOST_TEXT or len(self._known) >= _MOST:
                self._drop(next(iter(self._known)))
            self._size += size
            self._sizes[path] = size
            self._known[path] = drv

    def _drop(self, path: StorePath) -> None:
        del self._known[path]
        self._size -= self._sizes.pop(path)

    def forget(self, path: StorePath) -> None:
        """PATH is not valid any more."""
        with self._lock:
            self._outputs.pop(path, None)
            if path in self._known:
                self._drop(path)


class TooMany(Exception):
    """Reading all that is asked for would take long."""


class Sparingly:
    """Gives some derivations, but not so many, or so large ones, that it takes long."""

    def __init__(self, read: Read, all_of: Derivations) -> None:
        self._read = read
        self._all = all_of
        self._left = _MOST_READS

    def __call__(self, path: StorePath) -> Derivation:
        """Return the derivation PATH.

        :raises TooMany: enough have been read.
        """
        self._left -= _COST_OF_READING if self._all.known(path) is None else 1
        if self._left < 0 or self._all.takes_long(path):
            raise TooMany
        return self._read(path)


def contents(path: StorePath) -> bytes:
    """Read the file of a derivation, which must be a regular one.

    :raises StoreError: it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.read(fd, MAXIMUM_SIZE + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise StoreError(f"cannot read '{path}': {error.strerror}") from error
