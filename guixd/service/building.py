"""Requests that build (spec: protocol §5, op 9 and 10)."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from twisted.internet.task import deferLater

from guixd.build.request import BuildMode, BuildRequest, Wanted
from guixd.errors import BuildError, NotAllowed, NotInStore
from guixd.formats import operations as op
from guixd.formats.path import HASH_LENGTH, StoreDirectory
from guixd.service.session import Handlers, QuietError, Session
from guixd.service.settling import settling

READ_AT_ONCE = 10_000
"""How many items of a request are read before others have their turn."""


def wanted(store: StoreDirectory, item: str) -> Wanted:
    """Read ITEM: `X.drv` for all outputs, `X.drv!out,dev` for some, or another path.

    :raises NotInStore: the item cannot be the name of anything in the store.
    """
    name, _, outputs = item.partition("!")
    path = store.parse(name)
    if len(path.base) <= HASH_LENGTH or "\0" in path:
        raise NotInStore(f"'{path}' has no hash part and name, so it is not in the store")
    return Wanted(path, frozenset(outputs.split(",")) - {""} or None)


def build(session: Session, request: op.BuildPaths) -> Coroutine[Any, Any, None]:
    """Build what is asked for."""
    mode = BuildMode(request.mode) if request.mode in list(BuildMode) else BuildMode.NORMAL
    if mode is BuildMode.REPAIR and not session.trusted:
        raise QuietError(NotAllowed("repairing is a privileged operation"))
    return _build(session, request, mode)


async def _build(session: Session, request: op.BuildPaths, mode: BuildMode) -> None:
    peer = session.peer
    owner = (None, None) if peer is None else (peer.uid, peer.gid)
    options = session.options.for_builds(*owner)
    directory = session.store.directory
    items: list[Wanted] = []
    for item in request.items:
        items.append(wanted(directory, item))
        if len(items) % READ_AT_ONCE == 0:
            await deferLater(session.daemon.reactor, 0)  # others shall have their turn
    await session.daemon.build(BuildRequest(tuple(items), mode, options, session.roots), session)


async def ensure(session: Session, request: op.EnsurePath) -> None:
    """Make a path valid, by a substitute if it is not."""
    path, store = request.path, session.store
    if len(path.base) <= HASH_LENGTH or "\0" in path:
        raise NotInStore(f"'{path}' has no hash part and name, so it is not in the store")
    if store.database.is_valid(path):
        return
    peer = session.peer
    options = session.options.for_builds(*((None, None) if peer is None else (peer.uid, peer.gid)))
    wanted = (Wanted(path, itself=True),)
    await session.daemon.build(
        BuildRequest(wanted, BuildMode.NORMAL, options, session.roots), session
    )
    if not store.database.is_valid(path):
        raise BuildError(f"path '{path}' is not valid, and there is no substitute for it")


HANDLERS: Handlers = {op.BuildPaths: settling(build), op.EnsurePath: settling(ensure)}
