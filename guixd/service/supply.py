"""The means for substitutes, put together (spec: substitutes)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from guixd.build.threads import Threads
from guixd.net.receiving import FetcherLike
from guixd.service.connection import Reactor
from guixd.settings import Settings
from guixd.signatures.acl import Acl
from guixd.store.local import LocalStore

if TYPE_CHECKING:
    from guixd.build.substitutes import Substitutes


def make_substitutes(
    reactor: Reactor,
    threads: Threads,
    settings: Settings,
    store: LocalStore,
    fetcher: FetcherLike,
    acl: Acl,
    environ: Mapping[str, str],
) -> Substitutes:
    """Return what looks substitutes up by FETCHER, and downloads them to STORE.

    :param acl: whose signatures count.
    """
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
    servers = Servers(threads, settings)
    narinfos = Narinfos(
        reactor,
        threads,
        Lookups(threads, fetcher, servers.nearest),
        store.directory,
        directory,
        Judge(acl),
    )
    return Substitutes(
        reactor,
        threads,
        store,
        Claims(),
        narinfos,
        servers,
        fetcher,
        KeyWarnings(threads, acl),
    )
