"""Requests that ask about the store (spec: protocol §5)."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from guixd.formats import operations as op
from guixd.formats.operations import encode_reply
from guixd.formats.path import StorePath
from guixd.formats.wire import FLAG
from guixd.service.session import Encoded, Handlers, QuickHandlers, Session
from guixd.store.queries import Queries

BUILTIN_BUILDERS = ("download", "git-download")
MOST_ENCODED = 16384
"""How many encoded replies are kept."""
MOST_ASKED = 20_000
"""How many paths of one request are looked up in the reactor's thread."""
ASKED_AT_ONCE = 4096
_TRUE, _FALSE = FLAG.encode(True), FLAG.encode(False)


def is_valid(session: Session, request: op.IsValidPath) -> bool:
    # Whatever is valid is in the store.
    path = request.path
    if session.store.database.is_valid(path):
        return True
    session.store.directory.parse(path)
    return False


def quick_is_valid(session: Session, request: op.IsValidPath) -> bytes:
    return _TRUE if is_valid(session, request) else _FALSE


def valid_paths(
    session: Session, request: op.QueryValidPaths
) -> Iterable[StorePath] | Coroutine[Any, Any, Encoded]:
    if len(request.paths) > MOST_ASKED:
        return _many_valid_paths(session, request)
    return session.store.database.valid_in_order(request.paths)  # sorted already


async def _many_valid_paths(session: Session, request: op.QueryValidPaths) -> Encoded:
    return await session.daemon.threads(_read_valid, request, session.store.database.read_only_copy)


def _read_valid(request: op.QueryValidPaths, connect: Callable[[], Queries]) -> Encoded:
    """Look all paths up and encode the reply, in a thread, where nothing may take long at once."""
    valid: list[StorePath] = []
    queries = connect()
    try:
        for start in range(0, len(request.paths), ASKED_AT_ONCE):
            paths = request.paths[start : start + ASKED_AT_ONCE]
            found = queries.valid_paths(paths)
            valid += [path for path in paths if path in found]
        return Encoded(encode_reply(request, tuple(valid)))
    finally:
        queries.close()


async def all_valid_paths(session: Session, request: op.QueryAllValidPaths) -> Encoded:
    return await session.daemon.threads(_read_all, request, session.store.database.read_only_copy)


def _read_all(request: op.QueryAllValidPaths, connect: Callable[[], Queries]) -> Encoded:
    """Read all valid paths and encode the reply, in a thread."""
    queries = connect()
    try:
        return Encoded(encode_reply(request, tuple(queries.all_valid_paths())))
    finally:
        queries.close()


def path_info(session: Session, request: op.QueryPathInfo) -> op.PathInfoReply:
    info = session.store.database.path_info(request.path)
    return op.PathInfoReply(
        info.deriver, info.nar_hash.hex(), info.references, info.registration_time, info.nar_size
    )


def quick_path_info(session: Session, request: op.QueryPathInfo) -> bytes:
    known = session.daemon.encoded_infos
    info = session.store.database.path_info(request.path)
    pair = known.get(request.path)
    # The database returns the same object as long as nothing has changed.
    if pair is not None and pair[0] is info:
        return pair[1]
    reply = encode_reply(request, path_info(session, request))
    if len(known) >= MOST_ENCODED:
        known.clear()
    known[request.path] = info, reply
    return reply


def path_hash(session: Session, request: op.QueryPathHash) -> str:
    return session.store.database.path_info(request.path).nar_hash.hex()


def references(session: Session, request: op.QueryReferences) -> tuple[StorePath, ...]:
    return session.store.database.path_info(request.path).references


def deriver(session: Session, request: op.QueryDeriver) -> StorePath | None:
    return session.store.database.path_info(request.path).deriver


def referrers(session: Session, request: op.QueryReferrers) -> Iterable[StorePath]:
    return session.store.database.referrers(request.path)


def valid_derivers(session: Session, request: op.QueryValidDerivers) -> Iterable[StorePath]:
    return session.store.database.valid_derivers(request.path)


def outputs(session: Session, request: op.QueryDerivationOutputs) -> Iterable[StorePath]:
    return session.store.derivation_outputs(request.path).values()


def quick_outputs(session: Session, request: op.QueryDerivationOutputs) -> bytes:
    return encode_reply(request, outputs(session, request), session.connection.minor)


def output_names(session: Session, request: op.QueryDerivationOutputNames) -> Iterable[str]:
    return session.store.database.derivation_outputs(request.path)


def from_hash_part(session: Session, request: op.QueryPathFromHashPart) -> StorePath | None:
    return session.store.database.path_from_hash_part(request.hash_part)


def failed_paths(session: Session, _request: op.QueryFailedPaths) -> Iterable[StorePath]:
    return session.store.database.failed_paths()


def builtin_builders(_session: Session, _request: op.BuiltinBuilders) -> tuple[str, ...]:
    return BUILTIN_BUILDERS


def substitute_urls(session: Session, _request: op.SubstituteURLs) -> tuple[str, ...]:
    return session.options.substitute_urls()


HANDLERS: Handlers = {
    op.IsValidPath: is_valid,
    op.QueryValidPaths: valid_paths,
    op.QueryAllValidPaths: all_valid_paths,
    op.QueryPathInfo: path_info,
    op.QueryPathHash: path_hash,
    op.QueryReferences: references,
    op.QueryReferrers: referrers,
    op.QueryDeriver: deriver,
    op.QueryValidDerivers: valid_derivers,
    op.QueryDerivationOutputs: outputs,
    op.QueryDerivationOutputNames: output_names,
    op.QueryPathFromHashPart: from_hash_part,
    op.QueryFailedPaths: failed_paths,
    op.BuiltinBuilders: builtin_builders,
    op.SubstituteURLs: substitute_urls,
}

QUICK: QuickHandlers = {
    op.IsValidPath: quick_is_valid,
    op.QueryPathInfo: quick_path_info,
    op.QueryDerivationOutputs: quick_outputs,
}
