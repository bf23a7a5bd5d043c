"""What the URLs of substitute servers mean (spec: substitutes §3)."""

from __future__ import annotations

import posixpath
from urllib.parse import urlsplit

WEB = ("http", "https")


def is_web(server: str) -> bool:
    """Whether SERVER is reached by HTTP."""
    try:
        return urlsplit(server).scheme in WEB
    except ValueError:
        return False


def file_name(server: str) -> str | None:
    """Return the directory, or the file in it, that SERVER is; `None` if it is none."""
    if server.startswith("/"):
        return posixpath.normpath(server)
    try:
        parts = urlsplit(server)
    except ValueError:
        return None
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return posixpath.normpath(parts.path)
    return None
