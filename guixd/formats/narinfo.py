"""Narinfos: what a server says of one substitute (spec: substitutes §4, §10).

Servers are not trusted.  Only what stands before the signature is covered by it, so
nothing else than where to download may come from behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from guixd.errors import BadHash, BadNarinfo, GuixdError
from guixd.formats.hashes import BASE32_ALPHABET, digest_size, from_base32
from guixd.formats.path import HASH_LENGTH, StoreDirectory, StorePath, check_name

MOST_BYTES = 1 << 20
"""Bytes of the longest narinfo that is read."""
MOST_LINES = 1000
"""Lines of the longest narinfo, where each field has one."""
MOST_DOWNLOADS = 32
"""How many places of one narinfo are kept."""
LONGEST_NAME = 211
"""Characters of the longest name of an item, without the hash part."""
_LINE = re.compile(r"([A-Za-z%][A-Za-z0-9_%]*):(.*)", re.DOTALL)
_HASH_PART = re.compile(f"[{BASE32_ALPHABET}]{{{HASH_LENGTH}}}\\Z")
_NUMBER = re.compile(r"[0-9]{1,18}\Z", re.ASCII)
_MARK = b"Signature:"
_SINGLE = ("StorePath", "NarHash", "NarSize", "References")
_SIGNED = frozenset(_SINGLE)


@dataclass(frozen=True, slots=True)
class Download:
    """A place of the archive.

    :ivar url: absolute, or relative to the server's.
    :ivar size: bytes to transfer, `None` if the server does not say.
    """

    url: str
    compression: str = "none"
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Narinfo:
    """What is said of one item.

    :ivar algorithm: of `nar_hash`, the digest of the archive, which has `nar_size` bytes.
    :ivar signed: the text that the signature is about; empty if what counts is not signed.
    :ivar signature: the value of the field, `VERSION;HOST;BASE64`; empty without one.
    """

    path: StorePath
    algorithm: str
    nar_hash: bytes
    nar_size: int
    references: frozenset[StorePath]
    deriver: StorePath | None = None
    downloads: tuple[Download, ...] = ()
    signed: bytes = b""
    signature: str = ""

    def is_equivalent(self, other: Narinfo) -> bool:
        """Whether OTHER describes the same files with the same references."""
        return (
            self.path == other.path
            and self.algorithm == other.algorithm
            and self.nar_hash == other.nar_hash
            and self.nar_size == other.nar_size
            and self.references == other.references
        )

    @property
    def download_size(self) -> int:
        """The least number of bytes to transfer, 0 if unknown."""
        return min((d.size for d in self.downloads if d.size is not None), default=0)


def parse(data: bytes, store: StoreDirectory) -> Narinfo:
    """Read one record.

    :raises BadNarinfo: a field is missing, there twice, or not what it must be.
    """
    if len(data) > MOST_BYTES:
        raise BadNarinfo("a narinfo that is too long")
    record = _record(data)
    mark = record.find(_MARK)
    # Only at the beginning of a line is it a field.
    if mark < 0 or (mark > 0 and record[mark - 1 : mark] != b"\n"):
        mark = len(record)
    head, tail = _fields(record[:mark]), _fields(record[mark:])
    signature = next((value for name, value in tail if name == "Signature"), "")
    signed = bool(signature) and {name for name, _ in head} >= _SIGNED
    everything = head + tail
    values = {name: _single(name, everything) for name in _SINGLE}
    algorithm, digest = _hash(values["NarHash"])
    path = store_path(values["StorePath"].removeprefix(store.path + "/"), store)
    if path != values["StorePath"]:
        raise BadNarinfo(f"'{values['StorePath']}' is not in the store '{store.path}'")
    derivers = [value for name, value in (head if signed else everything) if name == "Deriver"]
    if len(derivers) > 1:
        raise BadNarinfo("more than one field Deriver")
    return Narinfo(
        path,
        algorithm,
        digest,
        _size("NarSize", values["NarSize"]),
        frozenset(store_path(base, store) for base in values["References"].split()),
        store_path(derivers[0], store) if derivers and derivers[0] else None,
        tuple(_downloads(everything)),
        record[:mark] if signed else b"",
        signature if signed else "",
    )


def store_path(base: str, store: StoreDirectory) -> StorePath:
    """Return the item whose base name is BASE, strictly tested.

    :raises BadNarinfo: it is not a hash part, a dash and a name.
    """
    name = base[HASH_LENGTH + 1 :]
    try:
        check_name(name)
        if (
            not _HASH_PART.match(base[:HASH_LENGTH])
            or base[HASH_LENGTH : HASH_LENGTH + 1] != "-"
            or not 0 < len(name) <= LONGEST_NAME
        ):
            raise BadNarinfo(f"'{base}' is not the name of an item")
        return store.child(base)
    except BadNarinfo:
        raise
    except GuixdError as error:
        raise BadNarinfo(error.text) from None


def _record(data: bytes) -> bytes:
    """Return DATA up to the empty line that ends the record."""
    start = len(data) - len(data.lstrip(b"\n"))
    end = data.find(b"\n\n", start)
    return data if end < 0 else data[: end + 1]


def _fields(data: bytes) -> list[tuple[str, str]]:
    if data.count(b"\n") > MOST_LINES:
        raise BadNarinfo("a narinfo with too many lines")
    fields: list[tuple[str, list[str]]] = []
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise BadNarinfo("a narinfo that is not UTF-8") from None
    for line in text.split("\n"):
        if not line or line[0] == "#":
            continue
        if line[0] == "+":
            if not fields:
                raise BadNarinfo("a continuation of nothing")
            fields[-1][1].append(line[1:].removeprefix(" "))
            continue
        match = _LINE.match(line)
        if match is None:
            raise BadNarinfo(f"'{line[:80]}' is not a field")
        fields.append((match[1], [match[2].strip(" \t\r")]))
    return [(name, "\n".join(parts)) for name, parts in fields]


def _single(name: str, fields: Iterable[tuple[str, str]]) -> str:
    found = [value for known, value in fields if known == name]
    if len(found) != 1:
        raise BadNarinfo(f"{'no' if not found else 'more than one'} field {name}")
    return found[0]


def _hash(text: str) -> tuple[str, bytes]:
    algorithm, _, digits = text.partition(":")
    try:
        return algorithm, from_base32(digits, digest_size(algorithm))
    except BadHash as error:
        raise BadNarinfo(error.text) from None


def _size(name: str, text: str) -> int:
    if not _NUMBER.match(text):
        raise BadNarinfo(f"'{text[:80]}' is no {name}")
    return int(text)


def _downloads(fields: Iterable[tuple[str, str]]) -> Iterable[Download]:
    """Put together the fields that are repeated in the same order."""
    repeated: dict[str, list[str]] = {"URL": [], "Compression": [], "FileSize": []}
    behind: dict[int, str] = {}
    for name, value in fields:
        if name in repeated:
            repeated[name].append(value)
        if name == "FileSize":
            behind[len(repeated["URL"]) - 1] = value
    urls, compressions, sizes = repeated.values()
    if len(compressions) not in (0, len(urls)):
        raise BadNarinfo("not as many compressions as URLs")
    # Sizes may be left out; then each is that of the URL which it stands behind.
    known = dict(enumerate(sizes)) if len(sizes) == len(urls) else behind
    for index, url in enumerate(urls[:MOST_DOWNLOADS]):
        size = known.get(index, "")
        yield Download(
            url,
            compressions[index] if compressions else "none",
            int(size) if _NUMBER.match(size) else None,
        )
