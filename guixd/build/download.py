"""`builtin:download`: one file from the first of many places that has it (spec: downloads).

A place whose file has another hash is no better than one that does not answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace

from guixd.build.disarchive import Disarchive
from guixd.build.downloadinputs import (
    Inputs,
    Refused,
    check_url,
    datum,
    expand,
    masked,
    read_beneath,
    read_inputs,
    resolve,
    strings,
    without_password,
)
from guixd.build.downloadtools import DownloadTools
from guixd.build.draft import Draft
from guixd.build.job import Job
from guixd.build.mirrorcode import BadMirrors, urls
from guixd.build.outputs import Known
from guixd.build.threads import to_the_end
from guixd.errors import FetchError
from guixd.formats.hashes import to_base32
from guixd.formats.path import StorePath
from guixd.formats.scheme import Datum
from guixd.formats.trace import DownloadProgress, DownloadStarted, DownloadSucceeded
from guixd.net.receiving import receive
from guixd.net.requests import LEAST, RESUMPTIONS, SCHEMES, Head, Request

ARCHIVE = "https://web.archive.org/web/20260101000000/"
"""What precedes a URL in the Internet Archive, which takes the nearest date."""
_REPORT = 10.0
"""Seconds between reports to readers that do not follow by traces."""
_BROKEN = ("body", "timeout")
"""Kinds of errors that may not come again, if something has come."""
_TRIES = 3
_KEPT_FREE = 8 << 20
"""Bytes that a download must leave free."""


class Download:
    """One download.

    :param directory: where the output is made, under its base name.
    :param hash_parts: what to look for in the file.
    :param say: writes to the build's log.
    :param report: likewise, what may be left out.
    :ivar known: at the end, what need not be found out about the output again.
    """

    def __init__(
        self,
        tools: DownloadTools,
        job: Job,
        directory: str,
        hash_parts: Iterable[str],
        say: Callable[[str], None],
        report: Callable[[str], None],
    ) -> None:
        self._tools = tools
        self._job = job
        self._directory = directory
        self._hash_parts = hash_parts
        self._say = say
        self._report = report
        self._follow = job.options.follow_downloads
        self._draft: Draft | None = None
        self._came = 0  # of what may still be on its way to the draft
        self.known: dict[StorePath, Known] = {}

    async def run(self) -> bool:
        """Download; return whether the output is there.

        It may be there with a wrong hash, as the last place had it.
        """
        try:
            return await self._run()
        except Refused as error:
            self._say(f"error: {error}\n")
        except OSError as error:
            self._say(f"error: cannot write the file: {error}\n")
        finally:
            if self._draft is not None:
                self._draft.close()
        return False

    async def _run(self) -> bool:
        inputs = await self._tools.threads(read_inputs, self._job.drv)
        await self._check_files(inputs)
        draft = self._draft = Draft(
            self._directory, inputs.output, inputs.executable, self._hash_parts
        )
        wrong = False
        async for url in self._places(inputs):
            if not await self._fetch(draft, inputs, url):
                continue
            if await self._is_right(draft, inputs, f"'{masked(url)}' has"):
                return True
            wrong = True
        if await self._rebuild(draft, inputs):
            if await self._is_right(draft, inputs, "Disarchive has made"):
                return True
            wrong = True
        if not wrong:
            self._say(f"failed to download '{inputs.output.path}' from any of the places\n")
        return wrong

    async def _is_right(self, draft: Draft, inputs: Inputs, who: str) -> bool:
        """Make DRAFT the output; return whether it has the right hash."""
        actual = await to_the_end(self._tools.threads(draft.finish), draft.interest.lose)
        if draft.measured is not None:
            self.known = {inputs.output.path: Known(draft.measured, actual)}
        else:
            self.known = {}
        if actual == inputs.output.digest():
            return True
        self._say(f"{who} another file, with hash {to_base32(actual)}\n")
        return False

    async def _rebuild(self, draft: Draft, inputs: Inputs) -> bool:
        """Let Disarchive rebuild the file, if that is wanted; return whether there is one."""
        name = "disarchive-mirrors"
        if "disarchive" not in inputs.methods or name not in inputs.files:
            return False
        if inputs.output.is_recursive:
            return False  # Servers do not know such hashes.
        mirrors = strings(await self._datum(inputs, name), name)
        disarchive = Disarchive(self._tools, self._job.path, self._say)
        return await disarchive.rebuild(inputs.output, mirrors, draft)

    async def _check_files(self, inputs: Inputs) -> None:
        """Refuse lists of mirrors that are not in the store, even if none will be needed."""
        for name in inputs.files:
            await self._read(inputs, name)

    async def _read(self, inputs: Inputs, name: str) -> str:
        """Return the text of the list of mirrors NAME."""
        tools, file = self._tools, inputs.files[name]
        relative = await tools.threads(resolve, tools.store, file)
        if not tools.is_valid(f"{tools.store.path}/{relative.partition('/')[0]}"):
            raise Refused(f"'{file}' is not in a valid item of the store")
        return await tools.threads(read_beneath, tools.store, relative)

    async def _datum(self, inputs: Inputs, name: str) -> Datum:
        """Return what the list of mirrors NAME says."""
        return await self._tools.threads(datum, await self._read(inputs, name), name)

    # --- where to look ------------------------------------------------------------

    async def _places(self, inputs: Inputs) -> AsyncIterator[str]:
        """Yield the URLs in the order in which they are to be tried."""
        first = ""
        if "upstream" in inputs.methods:
            for url in inputs.urls:
                found = [url]
                if check_url(url) == "mirror":
                    known = "mirrors" in inputs.files
                    mirrors = await self._datum(inputs, "mirrors") if known else ()
                    found = list(expand(url, mirrors))
                for each in found:
                    first = first or each
                    yield each
        if "content-addressed-mirrors" in inputs.methods:
            for url in await self._content_addressed(inputs):
                yield url
        first = first or inputs.urls[0]
        if "internet-archive" in inputs.methods and first.startswith(("http://", "https://")):
            yield ARCHIVE + without_password(first)

    async def _content_addressed(self, inputs: Inputs) -> list[str]:
        name = "content-addressed-mirrors"
        if name not in inputs.files:
            return []
        output = inputs.output
        try:
            text = await self._read(inputs, name)
            digest = output.digest()
            arguments = (text, output.path.name, output.hash_algorithm, digest)
            found = await self._tools.threads(urls, *arguments)
            for url in found:
                check_url(url)
        except (BadMirrors, Refused) as error:
            self._say(f"not trying content-addressed mirrors: {error}\n")
            return []
        return found

    # --- one of them --------------------------------------------------------------

    async def _fetch(self, draft: Draft, inputs: Inputs, url: str) -> bool:
        """Fetch URL into DRAFT; return whether it is complete."""
        shown = masked(url)
        self._say(f"\nstarting download of {inputs.output.path}\nfrom {shown}\n")
        if check_url(url) not in SCHEMES:
            self._say(f"URLs of type '{check_url(url)}' are not supported\n")
            return False
        request = Request(url, least=LEAST, resumptions=RESUMPTIONS, nearest=self._tools.nearest)
        for _ in range(_TRIES):
            draft.restart()
            try:
                await self._receive(draft, request, shown)
            except FetchError as error:
                self._say(f"error: {shown}: {error.text}\n")
                if error.kind == "tls" and request.verify:
                    # What comes is known by its hash; but nobody shall learn a password.
                    request = replace(request, verify=False)
                    self._say("trying again without knowing who answers\n")
                    continue
                broken = self._came and error.kind in _BROKEN
                if not broken and error.kind != "fetcher":
                    return False
                self._say("trying again from the beginning\n")
            else:
                return True
        return False

    async def _receive(self, draft: Draft, request: Request, shown: str) -> None:
        path = str(self._job.drv.outputs["out"].path)
        clock = self._tools.reactor
        told, size, self._came = clock.seconds(), None, 0

        def begin(head: Head) -> None:
            nonlocal size
            if head.offset:
                self._say(f"the connection broke, going on from byte {head.offset}\n")
                return
            size = head.size
            if size is not None and size > limit:
                raise FetchError("limit", f"{size} bytes are more than the disk has room for")
            draft.expect(size)
            if self._follow:
                self._trace(DownloadStarted(path, shown, head.size))
            elif head.size is not None:
                self._say(f"{head.size} bytes\n")

        def progress(done: int) -> None:
            nonlocal told
            self._came = done
            if self._follow:
                self._trace(DownloadProgress(path, shown, size, done))
            elif clock.seconds() - told >= _REPORT:
                told = clock.seconds()
                whole = f" of {size}" if size is not None else ""
                self._report(f"{done}{whole} bytes received\n")

        limit = max(draft.free_bytes() - _KEPT_FREE, 0)
        await receive(
            clock,
            self._tools.threads,
            self._tools.fetcher,
            replace(request, limit=limit),
            draft.write,
            head=begin,
            progress=progress,
        )
        if self._follow:
            self._say(DownloadSucceeded(path, shown, draft.size).line + "\n\n")
        else:
            self._say(f"downloaded {draft.size} bytes\n")

    def _trace(self, trace: DownloadStarted | DownloadProgress) -> None:
        write = self._report if isinstance(trace, DownloadProgress) else self._say
        write(trace.line + "\n")
