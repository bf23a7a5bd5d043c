"""Every request of the worker protocol and its reply (spec: protocol §5, §6).

A request is a frozen value whose annotations name the fields in wire order and
their kinds.  Servers decode requests and encode replies; clients do the
opposite; both use the same descriptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import (
    Annotated,
    Any,
    ClassVar,
    Final,
    Generic,
    TypeVar,
    dataclass_transform,
    get_type_hints,
)

from guixd.errors import NotAllowed, ProtocolError
from guixd.formats import wire
from guixd.formats.path import StorePath
from guixd.formats.wire import MORE, Kind, More, Series, Source

PROTOCOL_MINOR: Final = 0x64
"""Minor version of the protocol that this daemon speaks."""

Flag = Annotated[bool, wire.FLAG]
"""An integer, true if not 0."""
One = Annotated[bool, wire.ONE]
"""An integer, true if exactly 1."""
Int = Annotated[int, wire.INT]
Long = Annotated[int, wire.LONG]
Name = Annotated[str, wire.NAME]
Text = Annotated[bytes, wire.TEXT]
Path = Annotated[StorePath, wire.PATH]
OptionalPath = Annotated[StorePath | None, wire.OPTIONAL_PATH]
Paths = Annotated[tuple[StorePath, ...], wire.PATHS]
Names = Annotated[tuple[str, ...], wire.NAME_SET]

R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gate:
    """A field is on the wire only if `since` <= the client's minor < `before`."""

    since: int = 0
    before: int = 0x100

    def __contains__(self, minor: int) -> bool:
        return self.since <= minor < self.before


class Operation(Generic[R_co]):
    """A request; R_co is the type of its reply."""

    __slots__ = ()
    opcode: ClassVar[int]

    def encode(self, minor: int = PROTOCOL_MINOR) -> bytes:
        """Return the request as a client of MINOR sends it.

        Data that follow op 7 and answers to READ in op 27 are not part of it.
        """
        out = [wire.encode_int(self.opcode)]
        for name, kind in _layout(type(self), minor):
            kind.write(getattr(self, name), out)
        return b"".join(out)


OPERATIONS: Final[dict[int, type[Operation[Any]]]] = {}
"""The requests by opcode."""
_REPLIES: Final[dict[int, Callable[[int], Kind[Any]]]] = {}
_GATES: Final[dict[type, dict[str, tuple[Kind[Any], Gate]]]] = {}
_LAYOUTS: Final[dict[tuple[type, int], tuple[tuple[str, Kind[Any]], ...]]] = {}


def _describe(cls: type) -> dict[str, tuple[Kind[Any], Gate]]:
    """Read the kinds and gates of the fields of CLS from their annotations."""
    description: dict[str, tuple[Kind[Any], Gate]] = {}
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        notes = hints[field.name].__metadata__
        gate = next((note for note in notes if isinstance(note, Gate)), Gate())
        description[field.name] = (notes[0], gate)
    return description


@dataclass_transform(frozen_default=True)
def _operation(
    opcode: int, reply: Kind[Any] | Callable[[int], Kind[Any]]
) -> Callable[[type[T]], type[T]]:
    """Make a class the request OPCODE; REPLY may depend on the client's minor."""

    def decorate(cls: type[T]) -> type[T]:
        made: Any = dataclass(frozen=True, slots=True)(cls)
        made.opcode = opcode
        OPERATIONS[opcode] = made
        _REPLIES[opcode] = (lambda _minor: reply) if isinstance(reply, Kind) else reply
        return made  # type: ignore[no-any-return]

    return decorate


def _layout(cls: type, minor: int) -> tuple[tuple[str, Kind[Any]], ...]:
    """Return the fields of CLS that a client of MINOR sends or gets."""
    layout = _LAYOUTS.get((cls, minor))
    if layout is None:
        if cls not in _GATES:
            _GATES[cls] = _describe(cls)
        gates = _GATES[cls]
        layout = tuple((name, kind) for name, (kind, gate) in gates.items() if minor in gate)
        _LAYOUTS[cls, minor] = layout
    return layout


class Record(Kind[T], Generic[T]):
    """The fields of a dataclass in a row, as its annotations say."""

    __slots__ = ("_cls", "_layout", "_names", "_series")

    def __init__(self, cls: type[T], minor: int = PROTOCOL_MINOR) -> None:
        """Describe CLS as a client of MINOR gets it."""
        self._cls = cls
        layout = _layout(cls, minor)
        self._names = tuple(name for name, _ in layout)
        self._layout = layout
        self._series = Series(*(kind for _, kind in layout))

    def begin(self) -> wire.Reader[T]:
        return wire.Converted(self._series.begin(), self._make)

    def _make(self, values: tuple[Any, ...]) -> T:
        return self._cls(**dict(zip(self._names, values, strict=True)))

    def write(self, value: T, out: list[bytes]) -> None:
        for name, kind in self._layout:
            kind.write(getattr(value, name), out)


class Optional(Kind[T | None], Generic[T]):
    """The integer 0, or 1 and a value."""

    __slots__ = ("_full",)

    def __init__(self, kind: Kind[T]) -> None:
        """Make a KIND that may be absent."""
        self._full = kind

    def begin(self) -> wire.Reader[T | None]:
        return _OptionalReader(self._full)

    def write(self, value: T | None, out: list[bytes]) -> None:
        wire.FLAG.write(value is not None, out)
        if value is not None:
            self._full.write(value, out)


class _OptionalReader(Generic[T]):
    __slots__ = ("_kind", "_reader")

    def __init__(self, kind: Kind[T]) -> None:
        self._kind = kind
        self._reader: wire.Reader[T] | None = None

    def resume(self, source: Source) -> T | More | None:
        if self._reader is None:
            present = source.word()
            if present is MORE:
                return MORE
            if not present:
                return None
            self._reader = self._kind.begin()
        return self._reader.resume(source)


@dataclass(frozen=True, slots=True)
class PathInfoReply:
    """What is known of a valid path."""

    deriver: OptionalPath
    nar_hash: Name
    """64 lowercase hexadecimal digits."""
    references: Paths
    registration_time: Int
    nar_size: Long


@dataclass(frozen=True, slots=True)
class SubstitutableInfo:
    """What a substitute server says of a path; sizes in bytes."""

    deriver: OptionalPath
    references: Paths
    download_size: Long
    nar_size: Annotated[int, wire.LONG, Gate(7)] = 0


@dataclass(frozen=True, slots=True)
class SubstitutablePathInfo:
    """The same with the path."""

    path: Path
    deriver: OptionalPath
    references: Paths
    download_size: Long
    nar_size: Long


@dataclass(frozen=True, slots=True)
class Collected:
    """The outcome of a collection; `freed` in bytes."""

    paths: Paths
    freed: Long
    obsolete: Long = 0


@_operation(1, wire.FLAG)
class IsValidPath(Operation[bool]):
    """Whether a path is valid.  The path is not tested while decoding."""

    path: Name


@_operation(3, wire.FLAG)
class HasSubstitutes(Operation[bool]):
    """Whether a path can be substituted."""

    path: Path


@_operation(4, wire.NAME)
class QueryPathHash(Operation[str]):
    """The hash of a valid path's NAR, 64 hexadecimal digits."""

    path: Path


@_operation(5, wire.PATHS)
class QueryReferences(Operation[tuple[StorePath, ...]]):
    """What a valid path refers to."""

    path: Path


@_operation(6, wire.PATHS)
class QueryReferrers(Operation[tuple[StorePath, ...]]):
    """What refers to a path."""

    path: Path


@_operation(7, wire.PATH)
class AddToStore(Operation[StorePath]):
    """Add the NAR that follows the request.

    Unless `fixed`, the method is always sha256 over the NAR, and this value says so.
    """

    name: Name
    fixed: One
    recursive: One
    algorithm: Name

    def __post_init__(self) -> None:
        if not self.fixed:
            object.__setattr__(self, "recursive", True)
            object.__setattr__(self, "algorithm", "sha256")


@_operation(8, wire.PATH)
class AddTextToStore(Operation[StorePath]):
    """Add a regular file with given contents and references."""

    name: Name
    text: Text
    references: Paths


@_operation(9, wire.DONE)
class BuildPaths(Operation[None]):
    """Build or substitute; items are `X.drv`, `X.drv!out,dev` or other paths.

    `mode` is a value of `build.request.BuildMode`; others mean the same as 0.
    """

    items: Paths
    mode: Annotated[int, wire.INT, Gate(15)] = 0


@_operation(10, wire.DONE)
class EnsurePath(Operation[None]):
    """Make a path valid by substituting it."""

    path: Path


@_operation(11, wire.DONE)
class AddTempRoot(Operation[None]):
    """Protect a path until the session ends."""

    path: Path


@_operation(12, wire.DONE)
class AddIndirectRoot(Operation[None]):
    """Register a symbolic link outside the store as a root."""

    path: Name


@_operation(13, wire.DONE)
class SyncWithGC(Operation[None]):
    """Wait until no collection runs."""


@_operation(14, wire.PAIRS)
class FindRoots(Operation[tuple[tuple[str, str], ...]]):
    """The permanent roots: pairs of link and target, sorted by link."""


@_operation(16, wire.DONE)
class ExportPath(Operation[None]):
    """Write a path as an archive by WRITE messages."""

    path: Path
    sign: One


@_operation(18, wire.OPTIONAL_PATH)
class QueryDeriver(Operation[StorePath | None]):
    """The derivation that made a valid path."""

    path: Path


@_operation(19, wire.NOTHING)
class SetOptions(Operation[None]):
    """The client's wishes for the rest of the session; times in seconds.

    Fields that the client's version does not send have `None`.
    """

    keep_failed: Flag
    keep_going: Flag
    try_fallback: Flag
    verbosity: Int
    max_jobs: Annotated[int | None, wire.INT, Gate(0, 0x61)] = None
    max_silent_time: Annotated[int | None, wire.INT, Gate(0, 0x61)] = None
    use_offload: Annotated[bool | None, wire.FLAG, Gate(2)] = None
    build_verbosity: Annotated[int | None, wire.INT, Gate(4)] = None
    log_type: Annotated[int | None, wire.INT, Gate(4)] = None
    print_build_trace: Annotated[bool | None, wire.FLAG, Gate(4)] = None
    build_cores: Annotated[int | None, wire.INT, Gate(6, 0x61)] = None
    use_substitutes: Annotated[bool | None, wire.FLAG, Gate(10)] = None
    pairs: Annotated[tuple[tuple[str, str], ...], wire.PAIRS, Gate(12)] = ()


@_operation(20, Record(Collected))
class CollectGarbage(Operation[Collected]):
    """Collect; `max_freed` in bytes, 2**64 - 1 for no limit."""

    action: Int
    paths: Paths
    ignore_liveness: Flag
    max_freed: Long
    obsolete1: Int = 0
    obsolete2: Annotated[int, wire.INT, Gate(5)] = 0
    obsolete3: Annotated[int, wire.INT, Gate(5)] = 0


@_operation(21, lambda minor: Optional(Record(SubstitutableInfo, minor)))
class QuerySubstitutablePathInfo(Operation[SubstitutableInfo | None]):
    """What substitute servers say of one path (obsolete); the path is not tested."""

    path: Name


@_operation(22, wire.PATHS)
class QueryDerivationOutputs(Operation[tuple[StorePath, ...]]):
    """The outputs of a valid derivation."""

    path: Path


@_operation(23, wire.PATHS)
class QueryAllValidPaths(Operation[tuple[StorePath, ...]]):
    """All valid paths."""


@_operation(24, wire.PATHS)
class QueryFailedPaths(Operation[tuple[StorePath, ...]]):
    """The outputs whose builds are remembered to fail."""


@_operation(25, wire.DONE)
class ClearFailedPaths(Operation[None]):
    """Forget failures; `*` stands for all, the others are not tested."""

    paths: Names


@_operation(26, Record(PathInfoReply))
class QueryPathInfo(Operation[PathInfoReply]):
    """What is known of a valid path."""

    path: Path


@_operation(27, wire.PATHS_IN_ORDER)
class ImportPaths(Operation[tuple[StorePath, ...]]):
    """Import archives, which the daemon pulls by READ messages."""


@_operation(28, wire.NAME_SET)
class QueryDerivationOutputNames(Operation[tuple[str, ...]]):
    """The names of the outputs of a valid derivation."""

    path: Path


@_operation(29, wire.OPTIONAL_PATH)
class QueryPathFromHashPart(Operation[StorePath | None]):
    """The valid path with a given hash part."""

    hash_part: Name


@_operation(30, wire.List(Record(SubstitutablePathInfo)))
class QuerySubstitutablePathInfos(Operation[tuple[SubstitutablePathInfo, ...]]):
    """What substitute servers say of paths; the reply is sorted by path."""

    paths: Paths


@_operation(31, wire.PATHS)
class QueryValidPaths(Operation[tuple[StorePath, ...]]):
    """Those of the given paths that are valid."""

    paths: Paths


@_operation(32, wire.PATHS)
class QuerySubstitutablePaths(Operation[tuple[StorePath, ...]]):
    """Those of the given paths that can be substituted."""

    paths: Paths


@_operation(33, wire.PATHS)
class QueryValidDerivers(Operation[tuple[StorePath, ...]]):
    """The valid derivations that have a path as an output."""

    path: Path


@_operation(34, wire.DONE)
class OptimiseStore(Operation[None]):
    """Deduplicate the whole store."""


@_operation(35, wire.FLAG)
class VerifyStore(Operation[bool]):
    """Verify, and maybe repair; true if errors remain."""

    check_contents: Flag
    repair: Flag


@_operation(80, wire.NAMES)
class BuiltinBuilders(Operation[tuple[str, ...]]):
    """The names after `builtin:` that derivations may have as builder."""


@_operation(81, wire.NAMES)
class SubstituteURLs(Operation[tuple[str, ...]]):
    """Where substitutes come from, in configured order."""


@cache
def reply_kind(opcode: int, minor: int = PROTOCOL_MINOR) -> Kind[Any]:
    """Return how a client of MINOR gets the reply to OPCODE."""
    return _REPLIES[opcode](minor)


def encode_reply(operation: Operation[T], value: T, minor: int = PROTOCOL_MINOR) -> bytes:
    """Return what follows LAST in the reply VALUE to OPERATION for a client of MINOR."""
    return reply_kind(operation.opcode, minor).encode(value)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to read one request from a client of some minor."""

    cls: Callable[..., Operation[Any]]
    names: tuple[str, ...] | None
    """Names of the fields if some are left out."""
    kinds: tuple[Kind[Any], ...]
    single: Kind[Any] | None
    """The only kind, if it reads in one step or not at all: most queries."""


@cache
def _plans(minor: int) -> dict[int, _Plan]:
    plans = {}
    for opcode, cls in OPERATIONS.items():
        layout = _layout(cls, minor)
        names = tuple(name for name, _ in layout)
        whole = len(names) == len(_GATES[cls])
        kinds = tuple(kind for _, kind in layout)
        single = kinds[0] if whole and len(kinds) == 1 and kinds[0].begin() is kinds[0] else None
        plans[opcode] = _Plan(cls, None if whole else names, kinds, single)
    return plans


class Requests:
    """Decodes the requests of one client, one after the other."""

    __slots__ = ("_plan", "_plans", "_reader", "refused", "source")

    def __init__(
        self,
        source: Source,
        minor: int = PROTOCOL_MINOR,
        refused: Mapping[int, str] | None = None,
    ) -> None:
        """Decode what comes to SOURCE from a client of MINOR.

        :param refused: operations that are refused before their arguments are
            read, with the text that says so.
        """
        self.source = source
        self.refused = refused
        self._plans = _plans(minor)
        self._plan: _Plan | None = None
        self._reader: wire.SeriesReader | None = None

    def next(self) -> Operation[Any] | None:
        """Return the next whole request, or None if more bytes are needed.

        After `AddToStore` the source is at the beginning of the NAR.

        :raises ProtocolError: an unknown operation or a malformed argument.
        :raises NotInStore: an argument that should be a store path is none.
        :raises NotAllowed: an operation that is refused on this connection.
        """
        source = self.source
        plan, reader = self._plan, self._reader
        if plan is None or reader is None:
            opcode = source.word()
            if opcode is MORE:
                return None
            if self.refused and opcode in self.refused:
                raise NotAllowed(self.refused[opcode])
            plan = self._plans.get(opcode)
            if plan is None:
                raise ProtocolError(f"invalid operation {opcode}")
            if plan.single is not None:
                value = plan.single.resume(source)
                if value is not MORE:
                    return plan.cls(value)
            self._plan = plan
            self._reader = reader = wire.SeriesReader(plan.kinds)
        values = reader.resume(source)
        if values is MORE:
            return None
        self._plan = self._reader = None
        if plan.names is None:
            return plan.cls(*values)
        return plan.cls(**dict(zip(plan.names, values, strict=True)))
