"""Requests that build (spec: protocol §5, op 9 and 10)."""

from __future__ import annotations

from collections.abc import Coroutine
from functools import partial
from typing import Any

from twisted.internet.task import deferLater

from guixd.build.request import BuildMode, BuildRequest, Wanted
from guixd.errors import BuildError, NotAllowed, NotInStore
from guixd.formats import operations as op
from guixd.formats.path import HASH_LENGTH, StoreDirectory, StorePath
from guixd.service.session import Handlers, QuietError, Session
from guixd.service.settling import settling

READ_AT_ONCE = 10_000
"""How many items of a request are read before others have their turn."""


def wanted(store: StoreDirectory, item: str) -> Wanted:
    """Read ITEM: `X.drv` for all outputs, `X.drv!out,dev` for some, or another path.

    :raises NotInStore: the item cannot be the name of anything in the store.
    """
    name, _, outputs = item.partition("!")
    return Wanted(_checked(store.parse(name)), frozenset(outputs.split(",")) - {""} or None)


def _checked(path: StorePath) -> StorePath:
    """Return PATH, which can be the name of an item.

    :raises NotInStore: it cannot.
    """
    if len(path.base) <= HASH_LENGTH or "\0" in path:
        raise NotInStore(f"'{path}' has no hash part and name, so it is not in the store")
    return path


def build(session: Session, request: op.BuildPaths) -> Coroutine[Any, Any, None]:
    """Build what is asked for."""
    mode = BuildMode(request.mode) if request.mode in list(BuildMode) else BuildMode.NORMAL
    if mode is BuildMode.REPAIR and not session.trusted:
        raise QuietError(NotAllowed("repairing is a privileged operation"))
    return _build(session, request, mode)


async def _build(session: Session, request: op.BuildPaths, mode: BuildMode) -> None:
    options = session.build_options()
    directory = session.store.directory
    items: list[Wanted] = []
    for item in request.items:
        items.append(wanted(directory, item))
        if len(items) % READ_AT_ONCE == 0:
            await deferLater(session.daemon.reactor, 0)  # others shall have their turn
    await session.daemon.build(
        BuildRequest(tuple(items), mode, options, session.roots), session.log
    )


async def ensure(session: Session, request: op.EnsurePath) -> None:
    """Make a path valid, by a substitute if it is not."""
    path, store = _checked(request.path), session.store
    await session.when_free(partial(session.roots.add, path))
    if store.database.is_valid(path):
        return
    items = (Wanted(path, itself=True),)
    building = BuildRequest(items, BuildMode.NORMAL, session.build_options(), session.roots)
    await session.daemon.build(building, session.log)
    if not store.database.is_valid(path):
        raise BuildError(f"path '{path}' is not valid, and there is no substitute for it")


HANDLERS: Handlers = {op.BuildPaths: settling(build), op.EnsurePath: settling(ensure)}
