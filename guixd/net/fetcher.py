"""The process that talks to servers, without the daemon's privileges (spec: substitutes §10).

It serves the daemon over a `channel`.  Requests:
    ["proxies", http, https, exceptions]    once, first
    ["fetch", id, request]                  with the pipe that gets the body, maybe a file with it
    ["lookup", id, first, urls, fields, verify, nearest]
    ["cancel", id]
    ["ping"]
Answers:
    ["broken", text]                        it cannot serve, and ends
    ["ready", compressions]
    ["head", id, head]
    ["progress", id, bytes]
    ["done", id, head, received, written]
    ["failed", id, kind, text, http status]
    ["answer", id, number, status, max-age, kind, baking, more]   with a part of the body
    ["pong"]
"""

from __future__ import annotations

import encodings.idna  # All that will be needed must be loaded before.
import encodings.punycode  # noqa: F401
import os
import re
import signal
import socket
import stringprep  # noqa: F401
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twisted.internet import threads as _threads  # noqa: F401
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.main import installReactor
from twisted.internet.ssl import Certificate, trustRootFromCertificates
from twisted.logger import (
    FilteringLogObserver,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)
from twisted.protocols import tls as _tls  # noqa: F401
from twisted.python import threadpool as _threadpool  # noqa: F401
from twisted.python.failure import Failure

from guixd.errors import FetchError
from guixd.net.channel import LARGEST_DATA, Channel
from guixd.net.codecs import supported
from guixd.net.confinement import confine
from guixd.net.connections import Connections
from guixd.net.lookups import Lookups
from guixd.net.proxies import Proxies
from guixd.net.reach import Reach
from guixd.net.requests import Answer, Fetched, Head, Request
from guixd.net.transfers import Transfer

_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
"""Where systems keep the certificates that they trust."""
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def main(control: int) -> None:
    """Serve the daemon at the descriptor CONTROL until it hangs up."""
    end = socket.socket(fileno=control)
    end.set_inheritable(False)
    # Who stops the service signals all its processes: the daemon ends this one.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    bundle = os.environ.get("SSL_CERT_FILE") or ""
    bundles = (bundle, *_BUNDLES) if os.path.isabs(bundle) else _BUNDLES
    try:
        confine(bundles)
    except OSError as error:
        text = f"cannot give up privileges: {error}"
        end.send(b'["broken", "%b"]\n' % text.replace('"', "'").encode())
        os._exit(1)
    observer = FilteringLogObserver(
        textFileLogObserver(sys.stderr), [LogLevelFilterPredicate(LogLevel.error)]
    )
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)
    reactor: Any = EPollReactor()  # type: ignore[no-untyped-call]
    installReactor(reactor)  # type: ignore[no-untyped-call]
    Server(reactor, end, reactor.stop, bundles)
    reactor.run(installSignalHandlers=False)
    os._exit(0)


class Server:
    """What answers the daemon."""

    def __init__(
        self,
        reactor: Any,
        end: socket.socket,
        lost: Callable[[], None],
        bundles: tuple[str, ...] = (),
    ) -> None:
        self._reactor = reactor
        self._bundles = bundles
        self._trusted: Any = None
        self._connections = Connections(reactor, self._trust)
        self._proxies = Proxies()
        self._lookups = Lookups(self._reactor, self._connections, self._proxies)
        self._jobs: dict[int, list[Callable[[], None]]] = {}
        self._channel = Channel(reactor, end, self._received, lost)
        self._channel.send(["ready", supported()])

    def _trust(self) -> Any:
        if self._trusted is None:
            for name in self._bundles:
                try:
                    texts = _CERTIFICATE.findall(Path(name).read_bytes())
                except OSError:
                    continue
                self._trusted = trustRootFromCertificates(  # type: ignore[no-untyped-call]
                    [Certificate.loadPEM(text) for text in texts]
                )
                return self._trusted
            raise FetchError("tls", "no certificates of authorities are installed")
        return self._trusted

    def _received(self, message: list[Any], data: bytes, descriptors: list[int]) -> None:
        what, *arguments = message
        if what == "proxies":
            self._proxies = Proxies(*arguments)
            self._lookups = Lookups(self._reactor, self._connections, self._proxies)
        elif what == "fetch":
            self._fetch(*arguments, *descriptors)
        elif what == "lookup":
            self._lookup(*arguments)
        elif what == "cancel":
            for give_up in self._jobs.pop(arguments[0], ()):
                give_up()
        elif what == "ping":
            self._channel.send(["pong"])

    def _fetch(
        self, number: int, request: dict[str, Any], sink: int, source: int | None = None
    ) -> None:
        send = self._channel.send

        def began(head: Head) -> None:
            send(["head", number, asdict(head)])

        def ended(result: Fetched | Failure) -> None:
            self._jobs.pop(number, None)
            if isinstance(result, Fetched):
                send(["done", number, asdict(result.head), result.received, result.written])
                return
            error: Any = result.value
            if isinstance(error, CancelledError):
                error = FetchError("fetcher", "given up")
            elif not isinstance(error, FetchError):
                error = FetchError("body", f"{type(error).__name__}: {error}")
            send(["failed", number, error.kind, error.text, error.http_status])

        transfer = Transfer(
            self._reactor,
            self._connections,
            self._proxies,
            Request.from_json(request),
            sink,
            began,
            lambda received: send(["progress", number, received]),
            source,
        )
        running = Deferred.fromCoroutine(transfer.run())
        self._jobs[number] = [running.cancel]
        running.addBoth(ended)

    def _lookup(
        self,
        number: int,
        first: int,
        urls: list[str],
        fields: dict[str, str],
        verify: bool,
        nearest: int,
    ) -> None:
        def answered(index: int, answer: Answer) -> None:
            body = answer.body
            while True:
                part, body = body[:LARGEST_DATA], body[LARGEST_DATA:]
                told = (answer.status, answer.max_age, answer.kind, answer.baking, bool(body))
                self._channel.send(["answer", number, first + index, *told], part)
                if not body:
                    return

        give_up = self._lookups.ask(urls, fields, verify, answered, Reach(nearest))
        self._jobs.setdefault(number, []).append(give_up)
