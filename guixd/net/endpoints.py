"""How servers are reached: straight, through proxies, and with TLS (spec: downloads §4)."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Callable
from typing import Any

from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import (
    IOpenSSLClientConnectionCreator,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.ssl import CertificateOptions, optionsForClientTLS
from twisted.python.failure import Failure
from zope.interface import implementer

from guixd.errors import FetchError
from guixd.net.http1 import BadResponse, parse_head
from guixd.net.proxies import Proxy
from guixd.net.reach import Reach, beyond

_LONGEST_ANSWER = 64 << 10


def endpoint_for(
    reactor: Any,
    host: str,
    port: int,
    *,
    tls: bool,
    proxy: Proxy | None,
    trust: Callable[[], Any] | None,
    timeout: float,
    nearest: Reach = Reach.LOOPBACK,
) -> Any:
    """Return the endpoint for talking to HOST, by HTTP through PROXY if there is one.

    :param host: ASCII.
    :param trust: returns the trusted certificates; without it all are taken.
    :param timeout: seconds for each address.
    :param nearest: what HOST must not be nearer than; a proxy may be anywhere.
    """
    if proxy is None:
        endpoint: Any = _Endpoint(beyond(reactor, nearest), host, port, timeout=timeout)
    else:
        endpoint = _Endpoint(reactor, proxy.host, proxy.port, timeout=timeout)
    if not tls:
        return endpoint
    if proxy is not None:
        endpoint = TunnelEndpoint(endpoint, proxy, host, port)
    creator: Any = _Unverified(host) if trust is None else _verified(host, trust)
    return wrapClientTLS(creator, endpoint)


class _Endpoint(HostnameEndpoint):
    """Tries whatever name it is given: some have underscores, unlike those of IDNA."""

    @staticmethod
    def _hostAsBytesAndText(host: Any) -> tuple[bool, bytes, str]:
        try:
            return False, host.encode("idna"), host
        except UnicodeError:
            return HostnameEndpoint._hostAsBytesAndText(host)


def _verified(host: str, trust: Callable[[], Any]) -> Any:
    try:
        return optionsForClientTLS(host, trustRoot=trust())
    except UnicodeError:
        raise FetchError("tls", f"TLS: no certificate can be for {host}") from None


def basic(credentials: str) -> str:
    """Return the value of an authorisation field for CREDENTIALS, `user:password`."""
    return "Basic " + base64.b64encode(credentials.encode()).decode()


def bracketed(host: str) -> str:
    """Return HOST as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


@implementer(IOpenSSLClientConnectionCreator)
class _Unverified:
    """TLS with whoever answers, as the content is known by its hash."""

    _context: SSL.Context | None = None

    def __init__(self, host: str) -> None:
        self._host = host

    def clientConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        if _Unverified._context is None:
            options: Any = CertificateOptions(verify=False)
            _Unverified._context = options.getContext()
        connection = SSL.Connection(_Unverified._context, None)
        try:
            ipaddress.ip_address(self._host)
        except ValueError:
            connection.set_tlsext_host_name(self._host.encode())
        return connection


@implementer(IStreamClientEndpoint)
class TunnelEndpoint:
    """Connects to a host through a proxy's CONNECT.

    Fails with `FetchError` (kind `proxy`) if the proxy does not want to.
    """

    def __init__(self, endpoint: Any, proxy: Proxy, host: str, port: int) -> None:
        self._endpoint = endpoint
        self._proxy = proxy
        self._target = f"{bracketed(host)}:{port}"

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[Any]:
        """Return a Deferred with the protocol, connected to the far host."""
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> Any:
        lines = [f"CONNECT {self._target} HTTP/1.1", f"Host: {self._target}"]
        if self._proxy.credentials:
            lines.append(f"Proxy-Authorization: {basic(self._proxy.credentials)}")
        request = "\r\n".join([*lines, "", ""]).encode()
        tunnel = _Tunnel(self._proxy, request, factory)
        await self._endpoint.connect(Factory.forProtocol(lambda: tunnel))
        try:
            return await tunnel.opened
        except BaseException:
            tunnel.transport.abortConnection()
            raise


class _Tunnel(Protocol):
    """Asks the proxy, and then stands between its transport and the real protocol."""

    transport: Any

    def __init__(self, proxy: Proxy, request: bytes, factory: IProtocolFactory) -> None:
        self.opened: Deferred[Any] = Deferred(lambda _: None)
        self._proxy = proxy
        self._request = request
        self._factory = factory
        self._inner: Any = None
        self._answer = b""

    def connectionMade(self) -> None:
        self.transport.write(self._request)

    def dataReceived(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.dataReceived(data)
            return
        self._answer += data
        head, end, rest = self._answer.partition(b"\r\n\r\n")
        if not end:
            if len(self._answer) > _LONGEST_ANSWER:
                self._refuse("gives no proper answer")
            return
        try:
            answer = parse_head(head)
        except BadResponse:
            self._refuse("gives no proper answer")
            return
        if answer.status // 100 != 2:
            self._refuse(refusal(answer.status, answer.phrase), answer.status)
            return
        self._inner = self._factory.buildProtocol(self.transport.getPeer())
        self._inner.makeConnection(self.transport)
        if not self.opened.called:
            self.opened.callback(self._inner)
        if rest:
            self._inner.dataReceived(rest)

    def _refuse(self, text: str, status: int = 0) -> None:
        if not self.opened.called:
            self.opened.errback(FetchError("proxy", f"the proxy {self._proxy.name} {text}", status))
        self.transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._inner is not None:
            self._inner.connectionLost(reason)
        elif not self.opened.called:
            self._refuse("closed the connection")


def refusal(status: int, phrase: str) -> str:
    """Say what a proxy that answers STATUS does."""
    if status == 407:
        return "wants a user name and password, or others (407)"
    return f"refuses: {status} {phrase}".rstrip()
