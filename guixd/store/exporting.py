"""A store item out, as an archive that others can import (spec: store §12)."""

from __future__ import annotations

import hashlib
from collections.abc import Generator

from guixd.errors import StoreError
from guixd.formats import export
from guixd.formats.export import Description
from guixd.signatures import read_key_pair, sign
from guixd.store.dump import Block, blocks
from guixd.store.items import PathInfo


def export_item(info: PathInfo, keys: str | None) -> Generator[Block, None, None]:
    """Give the archive of the valid item INFO in blocks, each good until the next is asked for.

    To be closed if it is not wanted to the end; for one thread at a time.

    :param keys: the directory of the keys that are to sign it; `None` for no signature.
    :raises StoreError: the item cannot be read; or it has changed, which is found at its end.
    :raises GuixdError: the keys cannot be used, which is found at the end, too.
    """
    digest = hashlib.sha256()
    for block in blocks(None, info.path):
        digest.update(block)
        yield block
    found = digest.digest()
    # Stock daemons have registered items without a hash.
    if found != info.nar_hash and any(info.nar_hash):
        raise StoreError(
            f"the contents of '{info.path}' have changed: their hash is {found.hex()},"
            f" not {info.nar_hash.hex()}"
        )
    said = Description(info.path, info.references, info.deriver).encode()
    yield said
    if keys is None:
        yield export.UNSIGNED
        return
    digest.update(said)
    yield export.signed(sign(digest.digest(), read_key_pair(keys)))
