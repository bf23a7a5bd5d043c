"""Requests about options, roots and failures, and those that are not served yet."""

from __future__ import annotations

import os
import pwd

from guixd.build.request import Level
from guixd.errors import BadSetting, UnsupportedOperation
from guixd.formats import operations as op
from guixd.service.session import Handlers, QuietError, Session


def set_options(session: Session, request: op.SetOptions) -> None:
    try:
        users = session.options.apply(request)
    except BadSetting as error:
        raise QuietError(error) from error
    for name in users:
        try:
            uid = pwd.getpwnam(name).pw_uid
        except (KeyError, ValueError, UnicodeError):
            session.log.log(Level.INFO, f"user '{name}' is unknown here")
        else:
            session.store.ensure_user_directory(uid)


async def add_temp_root(session: Session, request: op.AddTempRoot) -> None:
    await session.when_free(lambda: session.roots.add(request.path))


def add_indirect_root(session: Session, request: op.AddIndirectRoot) -> None:
    path = "/" + os.path.normpath("/" + request.path).lstrip("/")
    session.store.add_indirect_root(path)


async def sync_with_gc(session: Session, _request: op.SyncWithGC) -> None:
    await session.daemon.threads(session.store.sync_with_gc)


async def find_roots(session: Session, _request: op.FindRoots) -> tuple[tuple[str, str], ...]:
    return await session.daemon.threads(session.store.find_roots)


def clear_failed_paths(session: Session, request: op.ClearFailedPaths) -> None:
    session.store.database.clear_failed(request.paths)


def not_yet(_session: Session, request: object) -> None:
    name = type(request).__name__
    raise UnsupportedOperation(f"{name} is not supported by this version of guixd yet")


HANDLERS: Handlers = {
    op.SetOptions: set_options,
    op.AddTempRoot: add_temp_root,
    op.AddIndirectRoot: add_indirect_root,
    op.SyncWithGC: sync_with_gc,
    op.FindRoots: find_roots,
    op.ClearFailedPaths: clear_failed_paths,
    op.CollectGarbage: not_yet,
    op.OptimiseStore: not_yet,
    op.VerifyStore: not_yet,
    op.ExportPath: not_yet,
    op.ImportPaths: not_yet,
}
