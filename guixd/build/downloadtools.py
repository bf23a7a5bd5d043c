"""What all downloads use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guixd.build.boxes import Boxes
from guixd.build.threads import Threads
from guixd.formats.path import StoreDirectory
from guixd.net.reach import Reach
from guixd.net.receiving import FetcherLike


@dataclass(frozen=True, slots=True)
class DownloadTools:
    """What all downloads use.

    :ivar is_valid: whether a path is a valid item of the store.
    :ivar nearest: what the places that derivations name must not be nearer than.
    :ivar boxes: where other programs run; `None` if there can be none.
    """

    reactor: Any
    threads: Threads
    fetcher: FetcherLike
    store: StoreDirectory
    is_valid: Callable[[str], bool]
    nearest: Reach = Reach.LOOPBACK
    boxes: Boxes | None = None
