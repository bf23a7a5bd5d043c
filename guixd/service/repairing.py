"""Making an item as it was when it was registered (spec: store §11)."""

from __future__ import annotations

from guixd.build.request import BuildMode, BuildRequest, Wanted
from guixd.errors import BuildError
from guixd.formats.path import StorePath
from guixd.service.session import Session


async def repair(session: Session, path: StorePath) -> None:
    """Replace the valid item PATH, whose files are damaged or gone: by a substitute, or anew.

    :raises BuildError: there is no way to make it.
    :raises GuixdError: that failed.
    """
    store = session.store
    options = session.build_options()
    if options.may_substitute:
        wanted = (Wanted(path, itself=True),)
        request = BuildRequest(wanted, BuildMode.REPAIR, options, session.roots)
        try:
            await session.daemon.build(request, session.log)
            return
        except BuildError:
            pass  # there is none, or it was no use
    info = store.database.find_path_info(path)
    deriver = None if info is None else info.deriver
    if deriver is None or not store.is_valid(deriver):
        raise BuildError(f"cannot repair path `{path}'")
    outputs = store.database.derivation_outputs(deriver)
    names = frozenset(name for name, output in outputs.items() if output == path)
    if not names:
        raise BuildError(f"cannot repair path `{path}'")
    request = BuildRequest((Wanted(deriver, names),), BuildMode.REPAIR, options, session.roots)
    await session.daemon.build(request, session.log)
