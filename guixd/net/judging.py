"""Whether narinfos are signed by somebody who counts (spec: substitutes §4)."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence

from guixd.errors import GuixdError
from guixd.formats.narinfo import Narinfo
from guixd.signatures import Acl, verify
from guixd.signatures.acl import Keyring, Keys

VERSION = "1"
MOST_KNOWN = 50_000
"""How many verdicts are kept."""


class Judge:
    """Says of narinfos whether a key of ACL has signed them; for any number of threads.

    Checking a signature takes a third of a millisecond, so what was found to be genuine
    is known for as long as the list names the same keys.
    """

    def __init__(self, acl: Acl) -> None:
        self._acl = acl
        self._known: tuple[Keys, set[bytes]] = Keys(frozenset()), set()

    def __call__(self, narinfos: Sequence[Narinfo]) -> list[bool]:
        """Say it of each; blocks.

        :raises GuixdError: the list cannot be read, which is not the narinfos' fault.
        """
        keys, genuine = self._known
        now = Keys(self._acl.keys())
        if keys != now or len(genuine) > MOST_KNOWN:
            keys, genuine = self._known = now, set()
        verdicts = []
        for each in narinfos:
            mark = _digest(each.signature.encode()) + _digest(each.signed)
            verdict = mark in genuine or is_authorised(each, keys)
            if verdict:
                genuine.add(mark)
            verdicts.append(verdict)
        return verdicts


def is_authorised(narinfo: Narinfo, keys: Keyring) -> bool:
    """Whether one of KEYS has signed what counts of NARINFO."""
    version, _, rest = narinfo.signature.partition(";")
    _host, separator, text = rest.partition(";")
    if version != VERSION or not separator or ";" in text or not narinfo.signed:
        return False
    try:
        signature = base64.b64decode(text, validate=True)
        verify(signature, keys, _digest(narinfo.signed))
    except (GuixdError, binascii.Error, ValueError):
        return False
    return True


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
