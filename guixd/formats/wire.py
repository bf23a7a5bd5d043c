"""Primitive encodings of the worker protocol, both ways and without I/O (spec: protocol §2).

`Source` holds received bytes.  A `Kind` knows how one type of value looks on
the wire: `write` encodes, `begin` gives a reader whose `resume(source)`
answers the value, or `MORE` when bytes are still missing.  What was read stays
read, so that the cost is linear in the bytes however they arrive, and memory
grows with what came, never with what a length promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from itertools import islice
from operator import lt
from struct import Struct
from typing import Any, Final, Generic, Literal, Protocol, TypeAlias, TypeVar

from guixd.errors import ProtocolError
from guixd.formats import packed
from guixd.formats.path import StoreDirectory, StorePath

KIB: Final = 1024
MAX_NAME: Final = 64 * KIB
"""Longest name or path in bytes."""
MAX_OPTION: Final = 1024 * KIB
MAX_TEXT: Final = 256 * 1024 * KIB
MAX_LIST: Final = 64 * 1024 * KIB
"""Most bytes of one list, its strings' length words and padding included."""

Data: TypeAlias = bytes | bytearray | memoryview


class _More(Enum):
    MORE = "more"


MORE: Final = _More.MORE
"""The answer of a reader that needs more bytes."""
More: TypeAlias = Literal[_More.MORE]

S = TypeVar("S", bound=str)
V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)

_words = Struct("<II").unpack_from
_long = Struct("<Q").unpack_from
_pack = Struct("<Q").pack
_ZEROS = tuple(bytes(n) for n in range(8))
_COMPACT = 64 * KIB


def encode_int(value: int) -> bytes:
    """Return the 8 bytes of an unsigned integer of up to 32 bits.

    :raises ValueError: VALUE does not fit.
    """
    if not 0 <= value < 1 << 32:
        raise ValueError(f"{value} is no unsigned integer of 32 bits")
    return _pack(value)


def encode_long(value: int) -> bytes:
    """Return the 8 bytes of an unsigned integer of up to 64 bits.

    :raises ValueError: VALUE does not fit.
    """
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{value} is no unsigned integer of 64 bits")
    return _pack(value)


def encode_bytes(value: Data) -> bytes:
    """Return the length of VALUE, its bytes, and its padding."""
    size = len(value)
    return b"".join((_pack(size), value, _ZEROS[-size & 7]))


def encode_string(value: str) -> bytes:
    """Return VALUE as a string; surrogate escapes become the bytes they stand for."""
    raw = value.encode("utf-8", "surrogateescape")
    size = len(raw)
    return _pack(size) + raw + _ZEROS[-size & 7]


def in_byte_order(values: Iterable[S]) -> list[S]:
    """Sort VALUES as their bytes would be and drop duplicates."""
    given = list(values)
    if len(given) < 2:
        return given
    if not all(map(str.isascii, given)):
        return sorted(set(given), key=lambda value: value.encode("utf-8", "surrogateescape"))
    if all(map(lt, given, islice(given, 1, None))):  # as most lists are that we send
        return given
    return sorted(set(given))


class Source:
    """Bytes received and not yet used.

    `feed` may borrow the caller's buffer; `settle` copies what is left of it,
    and must be called before the caller uses the buffer again.
    """

    __slots__ = ("_data", "_end", "_own", "_start", "store")

    def __init__(self, store: StoreDirectory | None = None) -> None:
        """Make an empty source; STORE tests the paths that are read from it."""
        self.store = store or StoreDirectory()
        self._data: Data = b""
        self._own: bytearray | None = None
        self._start = 0
        self._end = 0

    def __len__(self) -> int:
        return self._end - self._start

    def feed(self, data: Data, size: int | None = None) -> None:
        """Add the first SIZE bytes of DATA, all by default."""
        end = len(data) if size is None else size
        if self._start == self._end:
            self._data, self._start, self._end = data, 0, end
            self._own = None
            return
        self.settle()
        own = self._own
        assert own is not None
        own += data if end == len(data) else memoryview(data)[:end]
        self._end = len(own)

    def settle(self) -> None:
        """Take what is left into memory of our own."""
        own = self._own
        if self._start == self._end:
            self._data, self._own, self._start, self._end = b"", None, 0, 0
        elif own is None:
            self._own = self._data = bytearray(memoryview(self._data)[self._start : self._end])
            self._end -= self._start
            self._start = 0
        elif self._start >= _COMPACT:
            del own[: self._start]
            self._end -= self._start
            self._start = 0

    def rest(self) -> bytes:
        """Take all bytes out."""
        data = bytes(memoryview(self._data)[self._start : self._end])
        self._data, self._own, self._start, self._end = b"", None, 0, 0
        return data

    def word(self) -> int | More:
        """Take an integer of 32 bits out.

        :raises ProtocolError: the upper half is not zero.
        """
        start = self._start
        if self._end - start < 8:
            return MORE
        low, high = _words(self._data, start)
        if high:
            raise ProtocolError("integer in the protocol has more than 32 bits")
        self._start = start + 8
        return low  # type: ignore[no-any-return]

    def long(self) -> int | More:
        """Take an integer of 64 bits out."""
        start = self._start
        if self._end - start < 8:
            return MORE
        self._start = start + 8
        return _long(self._data, start)[0]  # type: ignore[no-any-return]

    def string(self, limit: int) -> Data | More:
        """Take a string of at most LIMIT bytes out; a view or a copy.

        :raises ProtocolError: it is longer, or its padding is not zero.
        """
        data = self._data
        start = self._start
        left = self._end - start
        if left < 8:
            return MORE
        size, high = _words(data, start)
        if high or size > limit:
            raise ProtocolError(f"string in the protocol has more than {limit} bytes")
        pad = -size & 7
        if left < 8 + size + pad:
            return MORE
        start += 8
        end = start + size
        if pad and data[end : end + pad] != _ZEROS[pad]:
            raise ProtocolError("padding of a string in the protocol is not zero")
        self._start = end + pad
        return data[start:end] if size < _COMPACT else memoryview(data)[start:end]

    def paths(self, most: int) -> list[StorePath]:
        """Take up to MOST store paths out, as many as are whole, if all are usual ones.

        Whatever is wrong or unusual is left to be found by who reads them one by one.
        """
        start = self._start
        if self._end - start < 8 or self._data[start] + 8 > self._end - start:
            return []  # Or each byte of the first one would cost a copy.
        end = min(self._end, start + most * packed.MOST_BYTES)
        data = bytes(memoryview(self._data)[start:end])
        texts, joined, used = packed.take_short(data, most)
        if not texts or not packed.all_below(joined, len(texts), self.store.path):
            return []
        self._start = start + used
        return list(map(StorePath, texts))


class Reader(Protocol[V_co]):
    """Reads one value, maybe in several steps."""

    def resume(self, source: Source) -> V_co | More:
        """Go on with SOURCE.

        :raises GuixdError: the bytes are not such a value.
        """
        ...


class Kind(Generic[V]):
    """How values of one type look on the wire."""

    __slots__ = ()

    def begin(self) -> Reader[V]:
        """Start to read a value; kinds that fit in one step read themselves."""
        return self

    def resume(self, source: Source) -> V | More:
        """Read a value from SOURCE, or nothing."""
        raise NotImplementedError

    def take(self, source: Source, most: int) -> list[V]:
        """Read up to MOST values at once, as far as that is quicker than one by one."""
        return []

    def write(self, value: V, out: list[bytes]) -> None:
        """Append the bytes of VALUE to OUT."""
        raise NotImplementedError

    def encode(self, value: V) -> bytes:
        """Return the bytes of VALUE."""
        out: list[bytes] = []
        self.write(value, out)
        return b"".join(out)


class _Int(Kind[int]):
    __slots__ = ()

    def resume(self, source: Source) -> int | More:
        return source.word()

    def write(self, value: int, out: list[bytes]) -> None:
        out.append(encode_int(value))


class _Long(Kind[int]):
    __slots__ = ()

    def resume(self, source: Source) -> int | More:
        return source.long()

    def write(self, value: int, out: list[bytes]) -> None:
        out.append(encode_long(value))


class _Flag(Kind[bool]):
    """True if not zero."""

    __slots__ = ()

    def resume(self, source: Source) -> bool | More:
        value = source.word()
        return MORE if value is MORE else value != 0

    def write(self, value: bool, out: list[bytes]) -> None:
        out.append(_pack(1 if value else 0))


class _One(_Flag):
    """True if exactly 1."""

    __slots__ = ()

    def resume(self, source: Source) -> bool | More:
        value = source.word()
        return MORE if value is MORE else value == 1


class _Done(Kind[None]):
    """The integer 1, which only says that something was done."""

    __slots__ = ()

    def resume(self, source: Source) -> More | None:
        return MORE if source.word() is MORE else None

    def write(self, value: None, out: list[bytes]) -> None:
        out.append(_pack(1))


class _Nothing(Kind[None]):
    """No bytes at all."""

    __slots__ = ()

    def resume(self, source: Source) -> More | None:
        return None

    def write(self, value: None, out: list[bytes]) -> None:
        pass


class Bytes(Kind[bytes]):
    """A string as bytes."""

    __slots__ = ("_limit",)

    def __init__(self, limit: int) -> None:
        """Allow LIMIT bytes."""
        self._limit = limit

    def resume(self, source: Source) -> bytes | More:
        data = source.string(self._limit)
        return MORE if data is MORE else bytes(data)

    def write(self, value: bytes, out: list[bytes]) -> None:
        size = len(value)
        out += (encode_int(size), value, _ZEROS[-size & 7])


class String(Kind[str]):
    """A string as text, with surrogate escapes for what is not UTF-8."""

    __slots__ = ("_limit",)

    def __init__(self, limit: int) -> None:
        """Allow LIMIT bytes."""
        self._limit = limit

    def resume(self, source: Source) -> str | More:
        data = source.string(self._limit)
        return MORE if data is MORE else str(data, "utf-8", "surrogateescape")

    def write(self, value: str, out: list[bytes]) -> None:
        out.append(encode_string(value))


class _Path(Kind[StorePath]):
    """A store path; `NotInStore` if its form is wrong."""

    __slots__ = ()

    def resume(self, source: Source) -> StorePath | More:
        data = source.string(MAX_NAME)
        if data is MORE:
            return MORE
        return source.store.parse(str(data, "utf-8", "surrogateescape"))

    def take(self, source: Source, most: int) -> list[StorePath]:
        return source.paths(most)

    def write(self, value: StorePath, out: list[bytes]) -> None:
        out.append(encode_string(value))


class _OptionalPath(Kind[StorePath | None]):
    """A store path, or the empty string for none."""

    __slots__ = ()

    def resume(self, source: Source) -> StorePath | More | None:
        data = source.string(MAX_NAME)
        if data is MORE:
            return MORE
        if not data:
            return None
        return source.store.parse(str(data, "utf-8", "surrogateescape"))

    def write(self, value: StorePath | None, out: list[bytes]) -> None:
        out.append(encode_string(value or ""))


INT: Final = _Int()
LONG: Final = _Long()
FLAG: Final = _Flag()
ONE: Final = _One()
DONE: Final = _Done()
NOTHING: Final = _Nothing()
NAME: Final = String(MAX_NAME)
OPTION: Final = String(MAX_OPTION)
TEXT: Final = Bytes(MAX_TEXT)
PATH: Final = _Path()
OPTIONAL_PATH: Final = _OptionalPath()


class _ListReader(Generic[V]):
    __slots__ = ("_convert", "_items", "_kind", "_left", "_reader", "_used")

    def __init__(
        self, kind: Kind[V], convert: Callable[[Iterable[V]], tuple[V, ...]] = tuple
    ) -> None:
        self._kind = kind
        self._convert = convert
        self._items: list[V] = []
        self._left: int | None = None
        self._reader: Reader[V] | None = None
        self._used = 0

    def resume(self, source: Source) -> tuple[V, ...] | More:
        left = self._left
        if left is None:
            count = source.word()
            if count is MORE:
                return MORE
            if not count:
                return ()
            left = count
        items, begin, reader, used = self._items, self._kind.begin, self._reader, self._used
        before = len(source)
        taken = False
        while left:
            if reader is None and not taken:
                taken = True  # Once a call at most, since it copies what it looks at.
                several = self._kind.take(source, left)
                items += several
                left -= len(several)
            else:
                if reader is None:
                    reader = begin()
                item = reader.resume(source)
                if item is MORE:
                    self._left, self._reader = left, reader
                    self._used = used + before - len(source)
                    return MORE
                reader = None
                items.append(item)
                left -= 1
            if used + before - len(source) > MAX_LIST:
                raise ProtocolError(f"list in the protocol has more than {MAX_LIST} bytes")
        return self._convert(items)


class List(Kind[tuple[V, ...]]):
    """Values in the order in which they come."""

    __slots__ = ("_kind",)

    def __init__(self, kind: Kind[V]) -> None:
        """Make a list of values of KIND."""
        self._kind = kind

    def begin(self) -> Reader[tuple[V, ...]]:
        return _ListReader(self._kind)

    def write(self, value: Iterable[V], out: list[bytes]) -> None:
        values = tuple(value)
        out.append(encode_int(len(values)))
        for item in values:
            self._kind.write(item, out)


def _in_byte_order(values: Iterable[S]) -> tuple[S, ...]:
    return tuple(in_byte_order(values))


class SortedSet(Kind[tuple[S, ...]], Generic[S]):
    """Strings sorted by their bytes, without duplicates, read and written so."""

    __slots__ = ("_kind",)

    def __init__(self, kind: Kind[S]) -> None:
        """Make a set of values of KIND."""
        self._kind = kind

    def begin(self) -> Reader[tuple[S, ...]]:
        return _ListReader(self._kind, _in_byte_order)

    def write(self, value: Iterable[S], out: list[bytes]) -> None:
        values = in_byte_order(value)
        out.append(encode_int(len(values)))
        encoded = packed.encode_short(values)
        if encoded is None:
            out += map(encode_string, values)
        else:
            out.append(encoded)


class Converted:
    """A reader whose value is then converted."""

    __slots__ = ("_convert", "_reader")

    def __init__(self, reader: Reader[Any], convert: Any) -> None:
        self._reader = reader
        self._convert = convert

    def resume(self, source: Source) -> Any:
        value = self._reader.resume(source)
        return MORE if value is MORE else self._convert(value)


class SeriesReader:
    """Reads one value of each kind in turn into a list."""

    __slots__ = ("_kinds", "_reader", "_values")

    def __init__(self, kinds: tuple[Kind[Any], ...]) -> None:
        self._kinds = kinds
        self._values: list[Any] = []
        self._reader: Reader[Any] | None = None

    def resume(self, source: Source) -> list[Any] | More:
        values, kinds, reader = self._values, self._kinds, self._reader
        for index in range(len(values), len(kinds)):
            if reader is None:
                reader = kinds[index].begin()
            value = reader.resume(source)
            if value is MORE:
                self._reader = reader
                return MORE
            reader = None
            values.append(value)
        self._reader = None
        return values


class Series(Kind[tuple[Any, ...]]):
    """A fixed number of values of different kinds, one after the other."""

    __slots__ = ("kinds",)

    def __init__(self, *kinds: Kind[Any]) -> None:
        """Make a series of KINDS."""
        self.kinds = kinds

    def begin(self) -> Reader[tuple[Any, ...]]:
        return Converted(SeriesReader(self.kinds), tuple)

    def write(self, value: tuple[Any, ...], out: list[bytes]) -> None:
        for kind, item in zip(self.kinds, value, strict=True):
            kind.write(item, out)


NAMES: Final = List(NAME)
NAME_SET: Final = SortedSet(NAME)
PATHS: Final = SortedSet(PATH)
PATHS_IN_ORDER: Final = List(PATH)
PAIRS: Final = List(Series(OPTION, OPTION))
