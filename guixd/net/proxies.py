"""Which proxy a URL goes through, by the daemon's environment (spec: downloads §4).

`http_proxy` is for http, `https_proxy` for https, `all_proxy` for both; `no_proxy` names
exceptions: host names (with all below them), addresses, networks like 10.0.0.0/8, each
maybe with a port, and `*`.  In upper case they count, too, but HTTP_PROXY does not where
a web server runs us, as its clients can set that.  An empty value means no proxy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from guixd.errors import FetchError

_DEFAULT_PORTS = {"http": 80, "https": 443, "ftp": 21}


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy."""

    host: str
    port: int
    credentials: str = ""
    """`user:password`, empty without."""

    @property
    def name(self) -> str:
        """For messages, without the credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxies of an environment, as their variables have them."""

    http: str = ""
    https: str = ""
    exceptions: Sequence[str] = ()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Proxies:
        """Read the variables; nothing in them is an error yet."""
        cgi = "REQUEST_METHOD" in environ

        def first(*names: str) -> str:
            return next((environ[name].strip() for name in names if name in environ), "")

        everything = ("all_proxy", "ALL_PROXY")
        upper = () if cgi else ("HTTP_PROXY",)
        return cls(
            first("http_proxy", *upper, *everything),
            first("https_proxy", "HTTPS_PROXY", *everything),
            tuple(first("no_proxy", "NO_PROXY").replace(",", " ").split()),
        )

    def proxy_for(self, url: str) -> Proxy | None:
        """Return the proxy that URL goes through, `None` if it goes straight.

        :raises FetchError: the variable makes no sense (kind `proxy`).
        """
        parts = urlsplit(url)
        value = {"http": self.http, "https": self.https}.get(parts.scheme, "")
        if not value:
            return None
        host, port = parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme]
        if any(_matches(exception, host, port) for exception in self.exceptions):
            return None
        return parse_proxy(value, f"{parts.scheme}_proxy")


def parse_proxy(value: str, variable: str) -> Proxy:
    """Read the VALUE of VARIABLE: a URL, or `HOST:PORT`.

    :raises FetchError: it is neither, or no HTTP proxy (kind `proxy`).
    """
    text = value if "://" in value else f"http://{value}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise FetchError("proxy", f"{variable} is not the address of a proxy")
    if parts.scheme != "http":
        raise FetchError("proxy", f"{variable}: proxies of type '{parts.scheme}' are not supported")
    credentials = ""
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return Proxy(host, port or _DEFAULT_PORTS["http"], credentials)


def _matches(exception: str, host: str, port: int) -> bool:
    """Whether EXCEPTION, a word of `no_proxy`, is about HOST and PORT."""
    if exception == "*":
        return True
    name, own_port = _split_port(exception.lower())
    if own_port is not None and own_port != port:
        return False
    host = host.lower().rstrip(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = name.removeprefix("*").lstrip(".").rstrip(".")
        return bool(name) and (host == name or host.endswith("." + name))
    try:
        return address in ipaddress.ip_network(name, strict=False)
    except ValueError:
        return False


def _split_port(exception: str) -> tuple[str, int | None]:
    """Split `name:80`, `[::1]:80`, `[::1]`, `::1` and the like."""
    if exception.startswith("["):
        name, _, rest = exception[1:].partition("]")
        port = rest.removeprefix(":")
    elif exception.count(":") == 1:
        name, _, port = exception.partition(":")
    else:
        name, port = exception, ""
    return name, int(port) if port.isascii() and port.isdigit() else None
