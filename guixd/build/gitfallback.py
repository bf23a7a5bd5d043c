"""What is done when Git could not check a commit out (spec: downloads §7).

First servers are asked for the archive of the tree, then Software Heritage.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ProcessDone
from twisted.python.failure import Failure

from guixd.build.downloadtools import DownloadTools
from guixd.build.gitdownload import Commit, read_commit
from guixd.build.heritage import Heritage, NotArchived
from guixd.build.job import Job
from guixd.build.narfallback import fetch_nar
from guixd.build.verdicts import timed_out
from guixd.errors import FetchError

_T = TypeVar("_T")


class GitFallback:
    """One attempt to get elsewhere what Git could not.

    :param private: a directory to be made, that nobody else can enter.
    :param open_build: returns a descriptor of the build directory.
    :param unpack: makes of an archive in there, by its name, the output there; returns how
        the program that does it has ended.
    :ivar directory: where the daemon itself has put the output, under its base name; empty
        if it has not.
    """

    def __init__(
        self,
        tools: DownloadTools,
        job: Job,
        private: str,
        open_build: Callable[[], int],
        unpack: Callable[[str], Awaitable[Failure]],
    ) -> None:
        self.directory = ""
        self._tools = tools
        self._job = job
        self._output = job.drv.outputs["out"]
        self._private = private
        self._open_build = open_build
        self._unpack = unpack

    async def run(self, reason: Failure) -> Failure:
        """Do what may help; return how it ended, which is REASON if nothing did.

        :raises BuildFailure: it takes too long.
        :raises CancelledError: nobody wants it any more.
        """
        commit, other = read_commit(self._job.drv), ""
        if "nar" in commit.methods:
            place = f"{self._private}/nar"
            os.makedirs(place, 0o700)
            os.chmod(self._private, 0o700)
            digest = await self._patiently(
                lambda: fetch_nar(self._tools, self._output, place, self._say)
            )
            other = place if digest else ""
            if digest == self._output.digest():
                return self._done(place)
        if "swh" in commit.methods and not commit.recursive:
            archive = await self._patiently(lambda: self._fetch_archive(commit))
            if archive:
                unpacked = await self._unpack(archive)
                if isinstance(unpacked.value, ProcessDone):
                    return unpacked
        return self._done(other) if other else reason

    def _done(self, directory: str) -> Failure:
        self.directory = directory
        return Failure(ProcessDone(0))  # type: ignore[no-untyped-call]

    def _say(self, text: str) -> None:
        data = text.encode("utf-8", "replace")
        self._job.patience.heard(len(data))
        self._job.say.output(data)

    async def _patiently(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Wait for WORK as long as the clients wait for a builder."""
        job, expired = self._job, ""
        running: Deferred[_T] = Deferred()

        def expire(reason: str) -> None:
            nonlocal expired
            expired = reason
            running.cancel()

        def start() -> Deferred[_T]:
            nonlocal running
            running = Deferred.fromCoroutine(work())
            return running

        job.patience.begin(expire)
        try:
            return await job.interest.wait(start)
        except CancelledError:
            if expired:
                raise timed_out(job.path, expired) from None
            raise
        finally:
            job.patience.end()

    async def _fetch_archive(self, commit: Commit) -> str:
        """Return the name of an archive of the tree, now in the build directory.

        It is empty if there is none.
        """
        heritage = Heritage(self._tools, self._say)
        self._say("trying Software Heritage\n")
        try:
            found = await heritage.find(self._output, commit.url, commit.commit)
            url = await heritage.cook(found)
            directory = self._open_build()
            try:
                return await heritage.save(url, directory)
            finally:
                os.close(directory)
        except (NotArchived, FetchError, OSError) as error:
            self._say(f"error: {error}\n")
            return ""
