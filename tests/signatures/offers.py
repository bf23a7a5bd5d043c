"""Narinfos as a server has them, signed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection

from guixd.formats.hashes import to_base32
from guixd.formats.path import StorePath
from guixd.signatures import KeyPair, sign


def narinfo_of(
    path: StorePath,
    nar: bytes,
    references: Collection[StorePath] = (),
    *,
    keys: KeyPair | None,
    url: str = "",
    compression: str = "none",
    size: int | None = None,
    file_size: int | None = None,
    deriver: str = "",
    version: str = "1",
) -> bytes:
    """Return what a server says of the item PATH with the archive NAR."""
    digest = to_base32(hashlib.sha256(nar).digest())
    text = (
        f"StorePath: {path}\nNarHash: sha256:{digest}\n"
        f"NarSize: {len(nar) if size is None else size}\n"
        f"References: {' '.join(each.base for each in references)}\n"
    )
    if deriver:
        text += f"Deriver: {deriver}\n"
    if keys is not None:
        signature = sign(hashlib.sha256(text.encode()).digest(), keys)
        text += f"Signature: {version};host;{base64.b64encode(signature).decode()}\n"
    text += f"URL: {url or 'nar/' + path.base}\nCompression: {compression}\n"
    if file_size is not None:
        text += f"FileSize: {file_size}\n"
    return text.encode()
