"""Directories from the archive of Software Heritage (spec: downloads §6, §7).

The archive knows directories by the hash of their NAR, or by the Git commit that had them.
Its vault makes a tar file of one, which may take it many minutes.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast
from urllib.parse import quote, urlsplit

from twisted.internet.task import deferLater

from guixd.build.diskspace import free_bytes
from guixd.build.downloadinputs import without_password
from guixd.build.downloadtools import DownloadTools
from guixd.errors import FetchError
from guixd.formats.derivation import Output
from guixd.net.reach import FARTHEST, reach_of_host
from guixd.net.receiving import receive
from guixd.net.requests import LONGEST_BODY, RESUMPTIONS, Request

HOST = "https://archive.softwareheritage.org"
POLL = 30.0
"""Seconds until the vault is asked again."""
_SCHEMES = ("https", "http")
_TRIES = 2
"""How often the vault is asked to make a directory that it has failed to make."""
_ID = re.compile(r"[0-9a-f]{40}\Z")
_DIRECTORY = "swh:1:dir:"
_BUSY = (202, 429, 502, 503, 504)
"""HTTP statuses that may be others the next time."""
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_KEPT_FREE = 64 << 20
"""Bytes that an archive must leave free."""
_HOPS = 5
"""Most releases that point to each other."""


class NotArchived(Exception):
    """The archive does not have it, or does not give it."""


class Heritage:
    """A client of the archive.

    :param say: writes to the build's log.
    """

    def __init__(self, tools: DownloadTools, say: Callable[[str], None]) -> None:
        self._tools = tools
        self._say = say

    async def find(self, output: Output, url: str, commit: str) -> str:
        """Return the identifier of the directory that OUTPUT is to be.

        :param commit: a commit's id, or a tag of the repository URL.
        :raises NotArchived: it is not known.
        :raises FetchError: the archive cannot be asked.
        """
        for way in (partial(self._by_hash, output), partial(self._by_commit, url, commit)):
            try:
                found = await way()
            except FetchError as error:
                if error.unreachable:
                    raise
                self._say(f"error: {error.text}\n")
            else:
                if found:
                    return _DIRECTORY + found
        raise NotArchived("Software Heritage does not know it")

    async def cook(self, directory: str) -> str:
        """Return the URL of a tar file with DIRECTORY, once the vault has made it.

        :raises NotArchived: it cannot make it.
        :raises FetchError: it cannot be asked.
        """
        url, tries = f"{HOST}/api/1/vault/flat/{directory}/", 0
        known = await self._ask(url)
        while True:
            status = known.get("status")
            if status == "done":
                return _place(known.get("fetch_url"))
            if status in (None, "failed"):
                if tries == _TRIES:
                    raise NotArchived(f"the vault cannot make {directory}")
                tries += 1
                self._say(f"asking Software Heritage to prepare {directory}\n")
                known = await self._ask(url, "POST")
                if known.get("status") == "done":
                    continue
            elif status not in ("new", "pending", "busy"):
                raise NotArchived("the vault's answer makes no sense")
            await deferLater(self._tools.reactor, POLL)
            known = await self._ask(url)

    async def save(self, url: str, directory: int) -> str:
        """Save what is at URL as a new file of the directory DIRECTORY, a descriptor.

        :return: its name; its owner can read it.
        :raises FetchError: it cannot be had.
        :raises OSError: it cannot be written.
        """
        self._say(f"downloading {url}\n")
        name = f"archive-{secrets.token_hex(8)}"
        descriptor = os.open(name, _CREATE, 0o600, dir_fd=directory)
        try:
            os.fchmod(descriptor, 0o644)
            limit = max(free_bytes(descriptor) - _KEPT_FREE, 0)

            def write(block: bytes) -> None:
                view = memoryview(block)
                while view:
                    view = view[os.write(descriptor, view) :]

            nearest = min(reach_of_host(urlsplit(HOST).hostname or ""), FARTHEST)
            request = Request(
                url, limit=limit, schemes=_SCHEMES, resumptions=RESUMPTIONS, nearest=nearest
            )
            await self._receive(request, write, lambda: _empty(descriptor))
        finally:
            os.close(descriptor)
        return name

    # --- which directory ------------------------------------------------------------

    async def _by_hash(self, output: Output) -> str:
        digest = base64.urlsafe_b64encode(output.digest()).decode()
        kind = f"nar-{output.hash_algorithm}"
        known = await self._ask(f"{HOST}/api/1/extid/{kind}/base64url:{digest}/?extid_version=1")
        target = str(known.get("target", ""))
        found = target.removeprefix(_DIRECTORY)
        return found if found != target and _ID.match(found) else ""

    async def _by_commit(self, url: str, commit: str) -> str:
        if not _ID.match(commit):
            commit = await self._revision(url, commit)
        if not commit:
            return ""
        known = await self._ask(f"{HOST}/api/1/revision/{commit}/")
        return _id(known.get("directory"))

    async def _revision(self, url: str, tag: str) -> str:
        """Return the commit that TAG of the repository URL was when it was visited last."""
        place = quote(without_password(url), safe=":/")
        visit = await self._ask(f"{HOST}/api/1/origin/{place}/visit/latest/?require_snapshot=true")
        snapshot = _id(visit.get("snapshot"))
        if not snapshot:
            return ""
        name = f"refs/tags/{tag}"
        query = f"branches_from={quote(name, safe='')}&branches_count=1"
        known = await self._ask(f"{HOST}/api/1/snapshot/{snapshot}/?{query}")
        branches = known.get("branches")
        target = branches.get(name) if isinstance(branches, dict) else None
        for _ in range(_HOPS):
            if not isinstance(target, dict):
                break
            found = _id(target.get("target"))
            if not found or target.get("target_type") == "revision":
                return found
            if target.get("target_type") != "release":
                break
            target = await self._ask(f"{HOST}/api/1/release/{found}/")
        return ""

    # --- how to ask -----------------------------------------------------------------

    async def _ask(self, url: str, method: str = "GET") -> Mapping[str, Any]:
        """Return the answer to a question; it is empty if the archive knows nothing.

        :raises FetchError: there is no answer.
        """
        parts: list[bytes] = []
        accept = (("Accept", "application/json"),)
        request = Request(url, limit=LONGEST_BODY, schemes=_SCHEMES, method=method, headers=accept)
        try:
            await self._receive(request, parts.append, parts.clear)
        except FetchError as error:
            if error.http_status == 404:
                return {}
            if error.http_status in _BUSY and "/vault/" in url:
                return {"status": "busy"}
            raise
        try:
            known = json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            known = None
        if not isinstance(known, dict):
            raise FetchError("body", f"{HOST} answers what makes no sense")
        return cast(Mapping[str, Any], known)

    async def _receive(
        self, request: Request, take: Callable[[bytes], object], clear: Callable[[], object]
    ) -> None:
        """Fetch REQUEST, if need be without knowing who answers: the hash tells what is right."""
        arguments = (self._tools.reactor, self._tools.threads, self._tools.fetcher)
        try:
            await receive(*arguments, request, take)
        except FetchError as error:
            if error.kind != "tls":
                raise
            clear()
            await receive(*arguments, replace(request, verify=False), take)


def _id(value: object) -> str:
    """Return VALUE if it is the identifier of an object, else nothing."""
    return value if isinstance(value, str) and _ID.match(value) else ""


def _place(url: object) -> str:
    if isinstance(url, str) and url.startswith(("https://", "http://")) and len(url) < 4096:
        return url
    raise NotArchived("the vault's answer makes no sense")


def _empty(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
