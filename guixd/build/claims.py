"""Who builds which output: waiting for one another inside the daemon (spec: build §4).

Different derivations may have the same output, as fixed ones often do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from twisted.internet.defer import Deferred

from guixd.formats.path import StorePath


class Claims:
    """The outputs that are being built, each with those who wait for it."""

    def __init__(self) -> None:
        self._waiting: dict[StorePath, deque[Deferred[None]]] = {}

    def claim(self, path: StorePath) -> Deferred[None] | None:
        """Take PATH: None if it was free, else a Deferred that fires when it is ours.

        Several paths are to be claimed in sorted order.  Cancel the Deferred to
        give up.
        """
        queue = self._waiting.get(path)
        if queue is None:
            self._waiting[path] = deque()
            return None
        waiter: Deferred[None] = Deferred(queue.remove)
        queue.append(waiter)
        return waiter

    def free(self, paths: Collection[StorePath]) -> None:
        """Give up claims."""
        for path in paths:
            queue = self._waiting[path]
            if queue:
                queue.popleft().callback(None)
            else:
                del self._waiting[path]
