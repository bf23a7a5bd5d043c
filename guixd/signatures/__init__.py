"""Signing and verifying as the stock daemon does, and the keys for it (spec: store §13).

Blocking: everything here reads files or computes for a millisecond or more, so
that it is for threads or for a process that may wait.
"""

from guixd.signatures.acl import Acl
from guixd.signatures.keys import KeyPair, read_key_pair, read_public_key
from guixd.signatures.signing import sign, verify

__all__ = ["Acl", "KeyPair", "read_key_pair", "read_public_key", "sign", "verify"]
