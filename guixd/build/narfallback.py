"""The tree of a Git commit from servers that have its archive (spec: downloads §7)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from guixd.build.diskspace import free_bytes
from guixd.build.downloadtools import DownloadTools
from guixd.build.threads import to_the_end
from guixd.errors import BadArchive, FetchError, StoreError
from guixd.formats import hashes
from guixd.formats.derivation import Output
from guixd.formats.hashes import to_base32
from guixd.formats.nar import NarParser
from guixd.net.receiving import receive
from guixd.net.requests import RESUMPTIONS, Request
from guixd.store.restore import TreeWriter
from guixd.store.trees import remove

_OTHER = "other"
_KEPT_FREE = 64 << 20
"""Bytes that an archive must leave free."""
SERVERS = ("http://bordeaux.guix.gnu.org", "http://ci.guix.gnu.org")
_FORMS = (("nar/lzip", "lzip"), ("nar", "none"))
"""Parts of URLs, and what is to be undone, in the order of preference."""


async def fetch_nar(
    tools: DownloadTools, output: Output, directory: str, say: Callable[[str], None]
) -> bytes:
    """Restore the archive of OUTPUT, under its base name, from the first server that has it.

    :param directory: where to; nobody else can enter it.
    :param say: writes to the build's log.
    :return: its hash, empty if there is no such server; another one than that of OUTPUT if
        all servers have another tree.
    """
    place = f"{directory}/{output.path.base}"
    other, down = b"", set[str]()
    for form, compression in _FORMS:
        for server in SERVERS:
            if server in down:
                continue
            url = f"{server}/{form}/{output.path.base}"
            say(f"trying {url}\n")
            request = Request(url, compression=compression, resumptions=RESUMPTIONS)
            try:
                digest = await _restore(tools, request, directory, output)
            except (FetchError, BadArchive, StoreError) as error:
                say(f"error: {error.text}\n")
                if isinstance(error, FetchError) and error.unreachable:
                    down.add(server)
            else:
                if digest == output.digest():
                    return digest
                say(f"'{url}' has another tree, with hash {to_base32(digest)}\n")
                if not other:
                    other = digest
                    os.rename(place, f"{directory}/{_OTHER}")
            await to_the_end(tools.threads(remove, None, place))
    if other:
        os.rename(f"{directory}/{_OTHER}", place)
    return other


async def _restore(tools: DownloadTools, request: Request, directory: str, output: Output) -> bytes:
    """Restore an archive; return its hash."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    request = replace(request, limit=max(free_bytes(opened) - _KEPT_FREE, 0))
    writer = TreeWriter(opened, output.path.base)
    parser = NarParser(writer)
    running = hashes.new(output.hash_algorithm)

    def take(block: bytes) -> None:
        running.update(block)
        if parser.feed(block) < len(block):
            raise BadArchive("bad archive: something follows it")
        if writer.error is not None:
            raise writer.error

    try:
        await receive(tools.reactor, tools.threads, tools.fetcher, request, take)
        parser.finish()
        writer.finish()
    finally:
        writer.close()
        os.close(opened)
    return running.digest()
