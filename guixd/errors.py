"""Errors that a client reads.

Each error has the text for the client, the status integer that follows it on
the wire, and a `reason` for programs.  One place, `service.session`, turns
them into messages.
"""

from __future__ import annotations

from typing import ClassVar

_LONGEST_TEXT = 1000
"""Most characters of what a server may have said."""


class GuixdError(Exception):
    """Something went wrong that the user should read about.

    :cvar status: the integer after the message in an ERROR reply
        (1; 100 for permanent build failures, 101 for timeouts).
    :cvar reason: a word for programs and logs.
    """

    status: int = 1
    reason: ClassVar[str] = "error"

    @property
    def text(self) -> str:
        """The message, one or more lines without a final newline."""
        return str(self.args[0]) if self.args else self.reason


class ProtocolError(GuixdError):
    """The peer broke the worker protocol, so that the connection must end."""

    reason = "protocol"


class NotAllowed(GuixdError):
    """The client lacks the privilege for this request."""

    reason = "not-allowed"


class NotInStore(GuixdError):
    """A path is not the name of a direct child of the store."""

    reason = "not-in-store"


class PathNotValid(GuixdError):
    """A store path is well-formed but not a valid item of the store."""

    reason = "path-not-valid"


class BadName(GuixdError):
    """A name has characters that a store item must not have."""

    reason = "bad-name"


class BadHash(GuixdError):
    """A hash does not have the form that its algorithm asks for."""

    reason = "bad-hash"


class BadArchive(GuixdError):
    """Bytes that should be a NAR are not one, in its canonical form."""

    reason = "bad-archive"


class BadNarinfo(GuixdError):
    """What a server says of a substitute is malformed, or about something else."""

    reason = "bad-narinfo"


class WrongHash(GuixdError):
    """An archive is not the one that it should be.

    :ivar expected: its hash in nix-base32; it has the hash `actual`.
    """

    reason = "wrong-hash"

    def __init__(self, path: str, algorithm: str, expected: str, actual: str) -> None:
        super().__init__(f"'{path}' should have the {algorithm} {expected}, but has {actual}")
        self.path = path
        self.algorithm = algorithm
        self.expected = expected
        self.actual = actual


class BadExpression(GuixdError):
    """Bytes that should be an S-expression, a key or a list of keys are not."""

    reason = "bad-expression"


class SignatureError(GuixdError):
    """Something cannot be signed, or a signature does not count."""

    reason = "signature"


class CorruptSignature(SignatureError):
    """A signature does not have the form of one."""

    reason = "signature-corrupt"


class UnauthorizedKey(SignatureError):
    """A signature was made by a key that the administrator has not authorised."""

    reason = "signature-unauthorized"


class OtherHashSigned(SignatureError):
    """A signature is for something else than what it came with."""

    reason = "signature-other"


class InvalidSignature(SignatureError):
    """A signature was not made by the key that it names."""

    reason = "signature-invalid"


class BadDerivation(GuixdError):
    """A derivation does not parse, or lies about its outputs."""

    reason = "bad-derivation"


class StoreError(GuixdError):
    """The store, its database or its file system refused something."""

    reason = "store"


class Busy(StoreError):
    """Another process holds a lock now; the same request can succeed a little later."""

    reason = "busy"


class ReferencesCycle(StoreError):
    """Items to register refer to each other in a circle."""

    reason = "cycle"


class BadSetting(GuixdError):
    """An option or setting has a value that cannot be."""

    reason = "bad-setting"


class SandboxError(GuixdError):
    """The container of a build could not be set up.

    :ivar phase: the name of the phase that failed, see `guixd.sandbox`.
    """

    reason = "sandbox"

    def __init__(self, phase: str, text: str) -> None:
        super().__init__(text)
        self.phase = phase


class BuildError(GuixdError):
    """A build or a whole build request failed; `status` is 1, 100 or 101."""

    reason = "build"

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class FetchError(GuixdError):
    """A server, or the way to it, did not give what was asked for.

    The text may have words of the server's, so nothing of it acts on a terminal.

    :ivar kind: `connect`, `dns`, `tls`, `proxy`, `http` (an answer that is no success),
        `redirect`, `body` (cut short or garbled), `timeout`, `limit` (too long), `url`
        (refused before any connection), `address` (nearer than it may be), `credentials`
        (they would not be safe), or
        `fetcher` (the helper process is gone: the same may succeed at once).
    :ivar http_status: what the server answered, 0 if it is not about that.
    """

    reason = "fetch"

    def __init__(self, kind: str, text: str, http_status: int = 0) -> None:
        shown = text[:_LONGEST_TEXT]
        super().__init__("".join(each if each.isprintable() else "?" for each in shown))
        self.kind = kind
        self.http_status = http_status

    @property
    def unreachable(self) -> bool:
        """Whether other questions would not be answered either, for now."""
        return self.kind in ("address", "connect", "dns", "proxy", "timeout", "tls")
