"""Telling who wants substitutes that nobody's are taken (spec: substitutes §4)."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from twisted.logger import Logger

from guixd.build.broadcast import Observer
from guixd.build.request import Level
from guixd.build.threads import Threads
from guixd.errors import GuixdError
from guixd.signatures.acl import Acl

_log = Logger()


class KeyWarnings:
    """Warns the administrator and each client once, and again when ACL has changed."""

    def __init__(self, threads: Threads, acl: Acl) -> None:
        self._threads = threads
        self._acl = acl
        self._logged = ""
        self._told: WeakKeyDictionary[Observer, str] = WeakKeyDictionary()

    async def tell(self, observer: Observer) -> None:
        """Warn OBSERVER, if there is a reason that it has not been told."""
        try:
            text = await self._threads(self._acl.shortcoming)
        except GuixdError:
            return  # which ends all judging, and is told there
        if text and text != self._logged:
            _log.warn("{text}", text=text)
        self._logged = text
        if text and text != self._told.get(observer):
            observer.log(Level.ERROR, f"warning: {text}")
        self._told[observer] = text
