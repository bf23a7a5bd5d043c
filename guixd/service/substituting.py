"""Questions about substitutes (spec: protocol §5; substitutes §9)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from guixd.formats import operations as op
from guixd.formats.path import StorePath
from guixd.service.session import Handlers, Session
from guixd.store.roots import canonical

if TYPE_CHECKING:
    from guixd.net.narinfos import Offer


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
    if not session.build_options().may_substitute:
        return None
    path = session.store.directory.parse(canonical(request.path))
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
