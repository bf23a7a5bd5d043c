"""Whether narinfos are signed by somebody who counts (spec: substitutes §4)."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence

from guixd.errors import GuixdError
from guixd.formats.narinfo import Narinfo
from guixd.signatures import Acl, verify

VERSION = "1"


def judge_of(acl: Acl) -> Callable[[Sequence[Narinfo]], list[bool]]:
    """Return a function that says of each narinfo whether a key of ACL has signed it.

    It blocks.  It raises `GuixdError` if ACL cannot be read.
    """

    def judge(narinfos: Sequence[Narinfo]) -> list[bool]:
        acl.keys()  # a list that cannot be read is not the narinfos' fault
        return [is_authorised(each, acl) for each in narinfos]

    return judge


def is_authorised(narinfo: Narinfo, acl: Acl) -> bool:
    """Whether a key of ACL has signed what counts of NARINFO."""
    version, _, rest = narinfo.signature.partition(";")
    _host, separator, text = rest.partition(";")
    if version != VERSION or not separator or ";" in text or not narinfo.signed:
        return False
    try:
        signature = base64.b64decode(text, validate=True)
        verify(signature, acl, hashlib.sha256(narinfo.signed).digest())
    except (GuixdError, binascii.Error, ValueError):
        return False
    return True
