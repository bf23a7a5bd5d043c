"""Replies that wait for the disk, for clients that want that (spec: store §8).

A trusted client sets `sync-before-registering`; then what it is told to be valid stays so
if the power fails a moment later.
"""

from __future__ import annotations

from collections.abc import Coroutine
from types import CoroutineType
from typing import Any

from guixd.service.session import Handler, Session


def settling(handler: Handler) -> Handler:
    """Return a handler that does what HANDLER does, and waits for the disk if it must."""

    def handle(session: Session, request: Any) -> Any:
        result = handler(session, request)
        return _settled(session, result) if session.options.settles else result

    return handle


async def _settled(session: Session, result: Coroutine[Any, Any, Any] | Any) -> Any:
    if type(result) is CoroutineType:
        result = await result
    durability = session.store.durability
    if durability is not None:
        await session.daemon.threads(durability.settle_all)
    return result
