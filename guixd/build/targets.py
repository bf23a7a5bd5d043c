"""Where a builder writes its outputs when their own places must not be touched (spec: build §9).

In a container they have those places for themselves.  Without one, outputs that are
valid already are redirected: the builder gets other names for them, of the same
length, and the names are put right in what it made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from guixd.formats.derivation import Derivation, Output
from guixd.formats.hashes import to_base32
from guixd.formats.path import HASH_LENGTH, StoreDirectory, StorePath


@dataclass(frozen=True, slots=True)
class Targets:
    """What is to be taken in, and where it is before that.

    :ivar wanted: the outputs to take in, by name.
    :ivar taken: those outputs whose own places have something that must stay.
    :ivar elsewhere: where the builder writes outputs instead, by their own paths.
    """

    wanted: Mapping[str, Output]
    taken: frozenset[StorePath] = frozenset()
    elsewhere: Mapping[StorePath, StorePath] = field(default_factory=dict)

    @property
    def free(self) -> list[StorePath]:
        """The wanted outputs whose own places may be cleared."""
        return [o.path for o in self.wanted.values() if o.path not in self.taken]

    @property
    def backward(self) -> dict[str, str]:
        """The right hash part for each that the builder got instead."""
        return {new.hash_part: old.hash_part for old, new in self.elsewhere.items()}

    def for_builder(self, drv: Derivation) -> Derivation:
        """Return DRV with arguments and environment as the builder shall get them."""
        if not self.elsewhere:
            return drv

        def forward(text: str) -> str:
            for old, new in self.elsewhere.items():
                text = text.replace(old.hash_part, new.hash_part)
            return text

        return replace(
            drv,
            arguments=tuple(map(forward, drv.arguments)),
            environment={name: forward(value) for name, value in drv.environment.items()},
        )


def redirected(store: StoreDirectory, drv: StorePath, output: StorePath) -> StorePath:
    """Return the path that the builder of DRV gets in place of its OUTPUT."""
    digest = hashlib.sha256(f"rewrite:{drv}:{output}".encode()).digest()
    return store.child(to_base32(digest)[:HASH_LENGTH] + output.base[HASH_LENGTH:])


def targets(
    store: StoreDirectory,
    drv: StorePath,
    wanted: Mapping[str, Output],
    taken: Collection[StorePath],
    *,
    contained: bool,
) -> Targets:
    """Return where the builder of DRV writes.

    :param taken: the outputs whose own places must stay as they are.
    :param contained: whether the builder has a container.
    """
    taken = frozenset(taken)
    if contained or not taken:
        return Targets(wanted, taken)
    return Targets(wanted, taken, {old: redirected(store, drv, old) for old in sorted(taken)})
