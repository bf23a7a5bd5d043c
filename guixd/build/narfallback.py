"""The tree of a Git commit from servers that have its archive (spec: downloads §7)."""

from __future__ import annotations

import os
from collections.abc import Callable

from guixd.build.download import DownloadTools
from guixd.errors import BadArchive, FetchError, StoreError
from guixd.formats.nar import NarParser
from guixd.formats.path import StorePath
from guixd.net.receiving import receive
from guixd.net.requests import Request
from guixd.store.restore import TreeWriter
from guixd.store.trees import remove

SERVERS = ("http://bordeaux.guix.gnu.org", "http://ci.guix.gnu.org")
_FORMS = (("nar/lzip", "lzip"), ("nar", "none"))
"""Parts of URLs, and what is to be undone, in the order of preference."""


async def fetch_nar(
    tools: DownloadTools, path: StorePath, directory: str, say: Callable[[str], None]
) -> bool:
    """Restore the archive of PATH, under its base name, from the first server that has it.

    Nothing vouches for it: its hash is still to be looked at.

    :param directory: where to; nobody else can enter it.
    :param say: writes to the build's log.
    :return: whether there is such a server.
    """
    for form, compression in _FORMS:
        for server in SERVERS:
            url = f"{server}/{form}/{path.base}"
            say(f"trying {url}\n")
            try:
                await _restore(tools, Request(url, compression=compression), directory, path.base)
            except (FetchError, BadArchive, StoreError) as error:
                say(f"error: {error.text}\n")
                await tools.threads(remove, None, f"{directory}/{path.base}")
            else:
                return True
    return False


async def _restore(tools: DownloadTools, request: Request, directory: str, base: str) -> None:
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    writer = TreeWriter(opened, base)
    parser = NarParser(writer)

    def take(block: bytes) -> None:
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
