"""Files rebuilt by Disarchive from directories of Software Heritage (spec: downloads §6).

Servers have specifications, by the hashes of files, that tell of which directory an archive
was made and how.  The program `disarchive`, if it is installed, does the rest, in a box.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable

from guixd.build import gitbox, treebox
from guixd.build.boxes import Box
from guixd.build.downloadinputs import masked
from guixd.build.downloadtools import DownloadTools
from guixd.build.draft import Draft
from guixd.build.gitdownload import PLACES, in_box
from guixd.build.heritage import Heritage, NotArchived
from guixd.build.threads import to_the_end
from guixd.errors import FetchError, GuixdError
from guixd.formats.derivation import Output
from guixd.formats.path import StorePath
from guixd.net.receiving import receive
from guixd.net.requests import Request

LARGEST = 16 << 20
"""Bytes of a specification."""
_DIRECTORY = re.compile(rb"swh:1:dir:[0-9a-f]{40}(?![0-9a-f])")
_SPECIFICATION, _OUT = "specification", "out"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_STEP = 1 << 20


class Disarchive:
    """Rebuilds one file.

    :param path: the derivation that is to download it.
    :param say: writes to the build's log.
    """

    def __init__(self, tools: DownloadTools, path: StorePath, say: Callable[[str], None]) -> None:
        self._tools = tools
        self._path = path
        self._say = say

    async def rebuild(self, output: Output, mirrors: Iterable[str], draft: Draft) -> bool:
        """Write the file that OUTPUT is to be into DRAFT.

        :param mirrors: URLs of servers that have specifications, with a slash at the end.
        :return: whether there is a file now; its hash is still to be looked at.
        """
        boxes = self._tools.boxes
        if boxes is None or not boxes.usable:
            self._say("not trying Disarchive, which is not run as root without build users\n")
            return False
        where = f"{boxes.host.environment.get('PATH', '')}:{PLACES}"
        program = shutil.which("disarchive", path=where)
        if program is None:
            self._say("not trying Disarchive, which is not installed\n")
            return False
        try:
            return await self._rebuild(program, output, mirrors, draft)
        except (NotArchived, FetchError, GuixdError, OSError) as error:
            self._say(f"error: {error}\n")
            return False

    async def _rebuild(
        self, program: str, output: Output, mirrors: Iterable[str], draft: Draft
    ) -> bool:
        specification = await self._specification(output, mirrors)
        found = _DIRECTORY.search(specification)
        if found is None:
            raise NotArchived("no specification tells of a directory in Software Heritage")
        heritage = Heritage(self._tools, self._say)
        url = await heritage.cook(found[0].decode())
        boxes = self._tools.boxes
        assert boxes is not None
        async with boxes.open(self._path, {_SPECIFICATION: specification}) as box:
            directory = box.workspace.open_build()
            try:
                archive = await heritage.save(url, directory)
                if not await self._assemble(box, program, archive):
                    return False
                copying = self._tools.threads(_copy, directory, box.uid, draft)
                await to_the_end(copying, draft.interest.lose)
            finally:
                os.close(directory)
        return True

    async def _specification(self, output: Output, mirrors: Iterable[str]) -> bytes:
        """Return the first specification that a server has; empty if none has one."""
        tools = self._tools
        for mirror in mirrors:
            url = f"{mirror}{output.hash_algorithm}/{output.digest().hex()}"
            self._say(f"asking {masked(url)}\n")
            parts: list[bytes] = []
            request = Request(url, limit=LARGEST, schemes=("https", "http"), nearest=tools.nearest)
            try:
                await receive(tools.reactor, tools.threads, tools.fetcher, request, parts.append)
            except FetchError as error:
                self._say(f"error: {error.text}\n")
            else:
                return b"".join(parts)
        return b""

    async def _assemble(self, box: Box, program: str, archive: str) -> bool:
        order = {
            "assembler": program,
            "specification": _SPECIFICATION,
            "archive": archive,
            "git": "",
            "environment": {"PATH": f"{os.path.dirname(program)}:{PLACES}"},
            "out": _OUT,
            "boxed": box.user is None,
        }
        directory = box.workspace.build_directory
        spec = in_box(order, (gitbox, treebox), box.user, directory)
        return await box.run(spec, lambda data: self._say(data.decode("utf-8", "replace")))


def _copy(directory: int, owner: int, draft: Draft) -> None:
    """Copy the file that OWNER has made in DIRECTORY into DRAFT; blocks."""
    source = os.open(_OUT, _READ, dir_fd=directory)
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != owner or status.st_nlink != 1:
            raise NotArchived("Disarchive has not made a plain file")
        draft.restart()
        draft.expect(status.st_size)
        while data := os.read(source, _STEP):
            draft.write(data)
    finally:
        os.close(source)
