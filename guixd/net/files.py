"""A file that the daemon has opened, as a body that comes (spec: substitutes §10)."""

from __future__ import annotations

import os
from typing import Any

from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure

from guixd.errors import FetchError
from guixd.net.ftp import Receiver
from guixd.net.http1 import ResponseHead

_BLOCK = 256 << 10


class FileReader:
    """Lets BODY have the file at DESCRIPTOR, which it owns; to BODY it is a connection.

    The file may lie where reading takes long, so that it is read in threads.
    """

    def __init__(self, reactor: Any, descriptor: int, body: Receiver) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._body = body
        self._held = True
        self._reading = False
        body.connection = self
        body.head(ResponseHead(200, "", {}, os.fstat(descriptor).st_size, False))

    def pause(self, on: bool) -> None:
        """Stop or resume reading."""
        self._held = on
        self._go_on()

    def abort(self) -> None:
        """Be done with the file."""
        self._body.connection = None
        if not self._reading:
            self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _go_on(self) -> None:
        if not self._held and not self._reading and self._descriptor >= 0:
            self._reading = True
            pool = self._reactor.getThreadPool()
            deferToThreadPool(self._reactor, pool, os.read, self._descriptor, _BLOCK).addCallbacks(
                self._take, self._failed
            )

    @property
    def _wanted(self) -> bool:
        return self._body.connection is self

    def _take(self, data: bytes) -> None:
        self._reading = False
        if not self._wanted:
            self._close()
        elif data:
            self._body.data(data)
            self._go_on()
        else:
            self.abort()
            self._body.end()

    def _failed(self, failure: Failure) -> None:
        self._reading = False
        wanted = self._wanted
        self.abort()
        if wanted:
            self._body.failed(FetchError("body", f"it cannot be read: {failure.value}"))
