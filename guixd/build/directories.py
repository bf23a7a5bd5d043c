"""Substitute servers that are directories of this machine (spec: substitutes §3, §10).

Who names such a server chooses what the daemon reads, so that only the administrator and
the trusted can.  Whoever can write there may not lead it elsewhere: below the directory no
link is followed, and nothing but regular files is opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from guixd.build.threads import Threads
from guixd.errors import FetchError
from guixd.formats.narinfo import MOST_BYTES
from guixd.formats.servers import file_name, is_web
from guixd.net.reach import Reach
from guixd.net.receiving import FetcherLike
from guixd.net.requests import Answer
from guixd.store.beneath import open_beneath

_AT_ONCE = 64
"""How many narinfos are read in one step of a thread."""


def open_file(directory: str, name: str) -> int:
    """Open the regular file NAME, which is relative to DIRECTORY, for reading; blocks.

    :return: a descriptor that is the caller's.
    :raises FetchError: it is something else, or behind a link.
    :raises OSError: it cannot be opened.
    """
    base = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = open_beneath(base, name, os.O_PATH)
    finally:
        os.close(base)
    try:
        # Even to open a device can have consequences, and a pipe may let one wait.
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise FetchError("url", f"{directory}/{name} is not a regular file")
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(found)


@dataclass(frozen=True, slots=True)
class Lookups:
    """Asks servers on the web by way of FETCHER, and looks into those that are directories.

    :ivar nearest: says of a URL what the server must not be nearer than.
    """

    threads: Threads
    fetcher: FetcherLike
    nearest: Callable[[str], Reach]

    def lookup(
        self, urls: Sequence[str], answered: Callable[[int, Answer], None]
    ) -> Awaitable[None]:
        """Get all URLS of one server; ANSWERED gets the index of each and its answer."""
        if urls and is_web(urls[0]):
            return self.fetcher.lookup(urls, answered, nearest=self.nearest(urls[0]))
        return self._read_all(urls, answered)

    async def _read_all(self, urls: Sequence[str], answered: Callable[[int, Answer], None]) -> None:
        for start in range(0, len(urls), _AT_ONCE):
            answers = await self.threads(_read, urls[start : start + _AT_ONCE])
            for index, answer in enumerate(answers, start):
                answered(index, answer)


def _read(urls: Sequence[str]) -> list[Answer]:
    return [_answer(file_name(url)) for url in urls]


def _answer(file: str | None) -> Answer:
    if file is None:
        return Answer(0, b"what is not http(s) or a directory is not supported", None)
    try:
        with os.fdopen(open_file(*os.path.split(file)), "rb") as stream:
            return Answer(200, stream.read(MOST_BYTES + 1), 0)
    except FileNotFoundError:
        return Answer(404, b"", 0)
    except OSError as error:
        return Answer(0, f"{file}: {error.strerror}".encode(), None)
    except FetchError as error:
        return Answer(0, error.text.encode(), None)
