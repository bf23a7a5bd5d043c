"""Where a substitute's archive can be had, the best place first (spec: substitutes §3, §7, §10)."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from urllib.parse import SplitResult, urljoin, urlsplit

from guixd.formats.narinfo import Download, Narinfo
from guixd.formats.servers import WEB, file_name
from guixd.net.reach import FARTHEST, Reach, reach_of_host

_BY_RATIO = ("lzip", "zstd", "xz", "bzip2", "gzip", "none")
"""What compresses best comes first."""


@dataclass(frozen=True, slots=True)
class Source:
    """A server, and what it says of an item."""

    server: str
    narinfo: Narinfo


@dataclass(frozen=True, slots=True)
class Place:
    """A place of an archive.

    :ivar url: absolute, or the name of a file of this machine if there is a `directory`.
    :ivar name: the URL without what is secret, for the user.
    :ivar size: bytes to transfer, `None` if unknown.
    :ivar directory: the server, if it is a directory of this machine, which the file is below.
    :ivar nearest: what the place must not be nearer than.
    """

    url: str
    name: str
    compression: str
    size: int | None
    directory: str = ""
    nearest: Reach = Reach.LOOPBACK


def places(source: Source, supported: Collection[str]) -> list[Place]:
    """Return the places that SOURCE names, those with the least to transfer first.

    What a server on the web says leads to the web only: never to files of this machine, and
    from elsewhere not to what only this machine can reach.

    :param supported: the compressions that can be undone.
    """
    all_ = (_place(source.server, d) for d in _known(source, supported))
    found = [place for place in all_ if place is not None]
    if all(place.size is not None for place in found):
        return sorted(found, key=lambda place: place.size or 0)
    return sorted(found, key=lambda place: _BY_RATIO.index(place.compression))


def with_places(source: Source, supported: Collection[str]) -> Narinfo:
    """Return what SOURCE says, with the downloads that can be undone, if one has a place."""
    useful = _known(source, supported)
    if all(_place(source.server, download) is None for download in useful):
        useful = ()
    return replace(source.narinfo, downloads=useful)


def _known(source: Source, supported: Collection[str]) -> tuple[Download, ...]:
    return tuple(d for d in source.narinfo.downloads if d.compression in supported)


def _place(server: str, download: Download) -> Place | None:
    directory = file_name(server)
    if directory is not None:
        return _local_place(directory, download)
    try:
        url = urljoin(server.rstrip("/") + "/", download.url)
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in WEB or not host or any(c in url for c in "\r\n \t\0"):
        return None
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    nearest = _nearest(urlsplit(server), parts)
    return Place(url, shown, download.compression, download.size, nearest=nearest)


def _nearest(server: SplitResult, place: SplitResult) -> Reach:
    """Return how near PLACE may be, to which SERVER leads."""
    if (server.hostname, server.port) == (place.hostname, place.port):
        return Reach.LOOPBACK
    return min(reach_of_host(server.hostname or ""), FARTHEST)


def _local_place(directory: str, download: Download) -> Place | None:
    """Return the file that a directory's narinfo names: one below it, or any on the web."""
    if urlsplit(download.url).scheme in WEB:
        return Place(download.url, download.url, download.compression, download.size)
    name = download.url.removeprefix("file://")
    path = os.path.normpath(os.path.join(directory, name))
    if not path.startswith(directory.rstrip("/") + "/") or "\0" in path:
        return None
    return Place(path, f"file://{path}", download.compression, download.size, directory)
