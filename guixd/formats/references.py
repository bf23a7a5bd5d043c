"""Finding the hash parts of store items in a stream (spec: build §10).

A hash part is 32 characters of an alphabet that leaves out the most frequent
letters, so that long runs of it are rare.  Every 32 characters contain eight
whose position is a multiple of four: only where eight such samples in a row
are in the alphabet does it pay to look closely.
"""

from __future__ import annotations

from collections.abc import Iterable

from guixd.formats.hashes import BASE32_ALPHABET
from guixd.formats.path import HASH_LENGTH

_STRIDE = 4
_IN, _OUT = b"x", b"-"
_CLASSES = bytes(_IN[0] if byte in BASE32_ALPHABET.encode() else _OUT[0] for byte in range(256))
_SAMPLES = _IN * (HASH_LENGTH // _STRIDE)
_BLANKED = bytes(byte if byte in BASE32_ALPHABET.encode() else 32 for byte in range(256))
_CARRIED = HASH_LENGTH - 1
_PIECE = HASH_LENGTH // 2


class Scanner:
    """Finds which of some hash parts occur in a stream, however it is cut into blocks.

    :ivar found: the hash parts that have occurred.
    :ivar wanted: those that have not, as bytes.
    """

    def __init__(self, hash_parts: Iterable[str]) -> None:
        self.found: set[str] = set()
        self.wanted = {part.encode() for part in hash_parts}
        self._pieces: set[bytes] | None = None
        self._carry = b""

    def update(self, chunk: bytes | bytearray | memoryview) -> None:
        """Look at the next bytes of the stream."""
        if not self.wanted:
            return
        block = bytes(chunk)
        self._look(self._carry + block[:_CARRIED])
        if len(block) > _CARRIED:
            self._look(block)
            self._carry = block[-_CARRIED:]
        else:
            self._carry = (self._carry + block)[-_CARRIED:]

    def _look(self, block: bytes) -> None:
        classes = block[::_STRIDE].translate(_CLASSES)
        at = classes.find(_SAMPLES)
        while at >= 0:
            end = classes.find(_OUT, at)
            if end < 0:
                end = len(classes)
            # Between the samples before and after those that are in the alphabet.
            lower = max((at - 1) * _STRIDE + 1, 0)
            for run in block[lower : end * _STRIDE].translate(_BLANKED).split():
                if len(run) >= HASH_LENGTH:
                    self._match(run)
            at = classes.find(_SAMPLES, end)

    def _match(self, run: bytes) -> None:
        """Look for what is wanted in RUN, text of the alphabet only.

        Whichever 32 characters are taken from it, one of the pieces of 16 into
        which it is cut here lies in them as a whole.
        """
        pieces = self._pieces
        if pieces is None:
            pieces = self._pieces = {
                part[at : at + _PIECE] for part in self.wanted for at in range(_PIECE + 1)
            }
        if not any(run[at : at + _PIECE] in pieces for at in range(0, len(run), _PIECE)):
            return
        wanted = self.wanted
        for at in range(len(run) - _CARRIED):
            part = run[at : at + HASH_LENGTH]
            if part in wanted:
                wanted.remove(part)
                self.found.add(part.decode())
