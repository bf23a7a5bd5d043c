"""An archive on its way from a server, or a file, to its staging place (spec: substitutes §7)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from guixd.build.directories import open_file
from guixd.build.threads import Threads, to_the_end
from guixd.build.watchers import Event
from guixd.errors import FetchError
from guixd.formats.sizes import short_size
from guixd.formats.trace import DownloadProgress, DownloadStarted, DownloadSucceeded
from guixd.net.places import Place
from guixd.net.receiving import FetcherLike, receive
from guixd.net.requests import LEAST, RESUMPTIONS, Head, Request
from guixd.store.incoming import Incoming

CONNECT_TIMEOUT = 5.0
IDLE_TIMEOUT = 30.0
"""Seconds until something must come; then the next place is tried."""


class Transfer:
    """One attempt to take an archive in from one place.

    :param tell: gets what happened.
    :param progress: gets lines for programs and for people, often.
    """

    def __init__(
        self,
        reactor: Any,
        threads: Threads,
        fetcher: FetcherLike,
        place: Place,
        incoming: Incoming,
        tell: Callable[[Event], None],
        progress: Callable[[str, str], None],
    ) -> None:
        self._reactor = reactor
        self._threads = threads
        self._fetcher = fetcher
        self._place = place
        self._incoming = incoming
        self._tell = tell
        self._progress = progress
        self._size = place.size

    async def run(self) -> None:
        """Take all of it in and compare it with what it should be.

        :raises FetchError: it did not come whole.
        :raises BadArchive: what came is no archive, or not as long as it should be.
        :raises WrongHash: it is another one.
        :raises StoreError: it could not be written.
        """
        fetched = await receive(
            self._reactor,
            self._threads,
            self._fetcher,
            self._request(),
            self._incoming.feed,
            head=self._begin,
            progress=self._went_on,
            source=await self._file(),
        )
        size = fetched.head.offset + fetched.received
        if self._incoming.left:  # bodies without a length may end anywhere
            raise FetchError("body", f"the archive ends {self._incoming.left} bytes too early")
        self._tell(Event(self._progress_line(size), download=True))
        text = f"downloaded {self._name}: {short_size(size)}"
        trace = DownloadSucceeded(self._incoming.path, self._place.name, size)
        self._tell(Event(trace.line, text, download=True))
        self._tell(Event("", download=True))
        await to_the_end(self._threads(self._incoming.finish))

    def _request(self) -> Request:
        return Request(
            self._place.url,
            # Signatures tell what is right; certificates, who may know a password.
            verify="@" in urlsplit(self._place.url).netloc,
            compression=self._place.compression,
            limit=self._incoming.nar_size,
            exact=self._place.compression == "none",
            schemes=("http", "https"),
            connect_timeout=CONNECT_TIMEOUT,
            idle_timeout=IDLE_TIMEOUT,
            least=LEAST,
            resumptions=RESUMPTIONS,
            nearest=self._place.nearest,
        )

    @property
    def _name(self) -> str:
        return self._incoming.path.base

    async def _file(self) -> int | None:
        """Open the archive, if it is a file of this machine."""
        place = self._place
        if not place.directory:
            return None
        opened: list[int] = []

        def open_it() -> None:
            name = os.path.relpath(place.url, place.directory)
            opened.append(open_file(place.directory, name))

        try:
            await to_the_end(self._threads(open_it))
        except OSError as error:
            raise FetchError("url", f"{place.url}: {error.strerror}") from None
        except BaseException:
            for descriptor in opened:
                os.close(descriptor)
            raise
        return opened[0]

    def _begin(self, head: Head) -> None:
        if head.offset:
            text = f"the connection broke; {self._name} goes on at {short_size(head.offset)}"
            self._tell(Event(text=text, download=True))
            return
        if head.size is not None:
            self._size = head.size
        size = "" if self._size is None else f" ({short_size(self._size)})"
        text = f"downloading {self._name} from {self._place.name}{size}..."
        trace = DownloadStarted(self._incoming.path, self._place.name, self._size)
        self._tell(Event(trace.line, text, download=True))

    def _went_on(self, done: int) -> None:
        if done == self._size:
            return  # which is told in any case
        text = f"downloading {self._name}: {short_size(done)}"
        if self._size:
            text += f" of {short_size(self._size)}, {min(done * 100 // self._size, 100)} %"
        self._progress(self._progress_line(done), text)

    def _progress_line(self, done: int) -> str:
        return DownloadProgress(self._incoming.path, self._place.name, self._size, done).line
