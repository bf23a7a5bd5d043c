"""Substitutes: the means for them, and questions about them (spec: protocol §5; substitutes)."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from guixd.formats import operations as op
from guixd.formats.path import StorePath
from guixd.service.session import Handlers, Session
from guixd.store.local import LocalStore

if TYPE_CHECKING:
    from guixd.build.substitutes import Substitutes
    from guixd.net.narinfos import Offer
    from guixd.service.daemon import Daemon


def make_substitutes(daemon: Daemon, store: LocalStore, environ: Mapping[str, str]) -> Substitutes:
    """Return what looks substitutes up and downloads them for DAEMON."""
    # Not needed to answer the first greeting.
    from guixd.build.claims import Claims
    from guixd.build.directories import Lookups
    from guixd.build.keywarnings import KeyWarnings
    from guixd.build.servers import Servers
    from guixd.build.substitutes import Substitutes
    from guixd.net.judging import Judge
    from guixd.net.narinfos import Narinfos

    cache = environ.get("XDG_CACHE_HOME")
    state = store.directories.state
    absolute = cache is not None and os.path.isabs(cache)
    directory = f"{cache}/guix/substitute" if absolute else f"{state}/substitute/cache"
    servers = Servers(daemon.threads, daemon.settings)
    narinfos = Narinfos(
        daemon.reactor,
        daemon.threads,
        Lookups(daemon.threads, daemon.fetcher, servers.nearest),
        store.directory,
        directory,
        Judge(daemon.acl),
    )
    return Substitutes(
        daemon.reactor,
        daemon.threads,
        store,
        Claims(),
        narinfos,
        servers,
        daemon.fetcher,
        KeyWarnings(daemon.threads, daemon.acl),
    )


async def _find(session: Session, paths: Collection[StorePath]) -> dict[StorePath, Offer]:
    options = session.build_options()
    if not paths or not options.may_substitute:
        return {}
    return await session.daemon.substitutes.find(paths, options, session.log)


async def has_substitutes(session: Session, request: op.HasSubstitutes) -> bool:
    return bool(await _find(session, [request.path]))


async def substitutable(
    session: Session, request: op.QuerySubstitutablePaths
) -> tuple[StorePath, ...]:
    return tuple(sorted(await _find(session, request.paths)))


async def substitutable_info(
    session: Session, request: op.QuerySubstitutablePathInfo
) -> op.SubstitutableInfo | None:
    path = session.store.directory.parse(request.path)
    offer = (await _find(session, [path])).get(path)
    if offer is None:
        return None
    known = offer.narinfo
    references = tuple(sorted(known.references))
    return op.SubstitutableInfo(known.deriver, references, offer.download_size, known.nar_size)


async def substitutable_infos(
    session: Session, request: op.QuerySubstitutablePathInfos
) -> tuple[op.SubstitutablePathInfo, ...]:
    found = await _find(session, request.paths)
    return tuple(
        op.SubstitutablePathInfo(
            path,
            offer.narinfo.deriver,
            tuple(sorted(offer.narinfo.references)),
            offer.download_size,
            offer.narinfo.nar_size,
        )
        for path, offer in sorted(found.items())
    )


HANDLERS: Handlers = {
    op.HasSubstitutes: has_substitutes,
    op.QuerySubstitutablePaths: substitutable,
    op.QuerySubstitutablePathInfo: substitutable_info,
    op.QuerySubstitutablePathInfos: substitutable_infos,
}
