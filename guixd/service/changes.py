"""Requests about options, temporary roots and failures."""

from __future__ import annotations

from functools import partial

from twisted.internet.task import deferLater
from twisted.logger import Logger

from guixd.build.request import Level
from guixd.errors import BadSetting, NotInStore
from guixd.formats import operations as op
from guixd.service.session import Handlers, QuietError, Session

_log = Logger()

CLEARED_AT_ONCE = 500
"""How many failures are forgotten in one transaction."""


def set_options(session: Session, request: op.SetOptions) -> None:
    try:
        users = session.options.apply(request)
    except BadSetting as error:
        raise QuietError(error) from error
    refused = session.options.refused_servers if session.options.use_substitutes else ()
    if refused:
        # One message: who wrote guix's client expected no more in reply to this request.
        urls = ", ".join(f"'{url}'" for url in refused)
        text = f"not looking for substitutes in {urls}: only the administrator names directories"
        session.log.log(Level.ERROR, text)
    for name in users:
        problem = session.store.ensure_user_directory(name)
        if problem:
            _log.info("{problem}", problem=problem)
    if session.options.substitute_urls():
        session.daemon.expect_downloads()


def add_temp_root(session: Session, request: op.AddTempRoot) -> None:
    if "\0" in request.path:
        # It would look like two in the file that collectors read.
        raise NotInStore(f"path '{request.path}' is not in the store: it has a null character")
    session.roots.add(request.path)


async def clear_failed_paths(session: Session, request: op.ClearFailedPaths) -> None:
    for start in range(0, len(request.paths), CLEARED_AT_ONCE):
        if start:
            await deferLater(session.daemon.reactor, 0)  # others shall have their turn
        words = request.paths[start : start + CLEARED_AT_ONCE]
        await session.when_free(partial(session.store.database.clear_failed, words))


HANDLERS: Handlers = {
    op.SetOptions: set_options,
    op.AddTempRoot: add_temp_root,
    op.ClearFailedPaths: clear_failed_paths,
}
