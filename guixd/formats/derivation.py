"""Derivations: their text, their hashes and the output paths that follow from them.

Source: spec: derivations §1-§6.  The grammar is taken strictly, so that a text has
one meaning; only the order of entries is free, because hashes are computed from the
sorted form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TypeVar

from guixd.errors import BadDerivation
from guixd.formats.hashes import from_hex
from guixd.formats.path import DERIVATION_SUFFIX, StoreDirectory, StorePath

MAXIMUM_SIZE = 64 << 20
"""The longest text of a derivation, in bytes."""

# Stand for escapes while a text is cut at its quotes: rare characters, or, if these
# occur in it, such as decoding never yields (but which make a wide, slow string).
_MARKS = ("\x01", "\x02"), ("\ud800", "\ud801")
_ESCAPES = ("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")
_STRING = "\0"

_Text = TypeVar("_Text", bound=str)

InputHash = Callable[[StorePath], bytes]
"""Gives the modulo hash of an input derivation."""


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a derivation."""

    path: StorePath
    algorithm: str = ""
    """Of a fixed output: a hash algorithm, with `r:` before it if of the NAR; else empty."""
    hash: str = ""
    """Of a fixed output: the digest in hexadecimal; else empty."""

    @property
    def is_fixed(self) -> bool:
        """Whether the contents are known beforehand."""
        return bool(self.hash)

    @property
    def is_recursive(self) -> bool:
        """Whether the fixed hash is that of the NAR."""
        return self.algorithm.startswith("r:")

    @property
    def hash_algorithm(self) -> str:
        """The algorithm without its mode."""
        return self.algorithm.removeprefix("r:")

    def digest(self) -> bytes:
        """Return the fixed digest.

        :raises BadHash: unknown algorithm, or the digest has not its form.
        """
        return from_hex(self.hash, self.hash_algorithm)


@dataclass(frozen=True, slots=True)
class Derivation:
    """What to run to make some outputs.  The mappings must not be changed."""

    outputs: Mapping[str, Output]
    inputs: Mapping[StorePath, tuple[str, ...]]
    """Input derivations with the names of their outputs that are used."""
    sources: tuple[StorePath, ...]
    platform: str
    builder: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def is_fixed(self) -> bool:
        """Whether it is *named* by its contents: one fixed output `out` (§3.1)."""
        return len(self.outputs) == 1 and "out" in self.outputs and self.outputs["out"].is_fixed

    @property
    def has_fixed_outputs(self) -> bool:
        """Whether it is *built* as fixed: every output is (§6); true without outputs."""
        return all(output.is_fixed for output in self.outputs.values())

    @property
    def output_paths(self) -> tuple[StorePath, ...]:
        """The paths of the outputs, in the order of their names."""
        return tuple(self.outputs[name].path for name in _sorted(self.outputs))

    @property
    def references(self) -> frozenset[StorePath]:
        """What the derivation's own text must refer to: its inputs and sources."""
        return frozenset((*self.inputs, *self.sources))


def derivation_name(path: StorePath) -> str:
    """Return the name of the derivation at PATH, without `.drv`.

    :raises BadDerivation: PATH does not end so.
    """
    if not path.is_derivation:
        raise BadDerivation(f"'{path}' is not the name of a derivation")
    return path.name.removesuffix(DERIVATION_SUFFIX)


# --- text -------------------------------------------------------------------


def parse(data: bytes, store: StoreDirectory, label: str = "") -> Derivation:
    """Read a derivation.  Time and memory are linear in the size of DATA.

    :param label: what to call the text in errors, usually its store path.
    :raises BadDerivation: "error parsing derivation ...".
    """
    try:
        return _parse(data, store)
    except _Unreadable as unreadable:
        where = f" '{label}'" if label else ""
        raise BadDerivation(f"error parsing derivation{where}: {unreadable}") from None


class _Unreadable(Exception):
    pass


def _parse(data: bytes, store: StoreDirectory) -> Derivation:
    if len(data) > MAXIMUM_SIZE:
        raise _Unreadable(f"longer than {MAXIMUM_SIZE} bytes")
    text = data.decode("utf-8", "surrogateescape")
    for raw, what in ("\0", "NUL"), ("\n", "newline"), ("\r", "return"), ("\t", "tabulator"):
        if raw in text:
            raise _Unreadable(f"raw {what} character at offset {text.index(raw)}")
    backslash = quote = ""
    if "\\" in text:
        # Runs of backslashes pair up from their start, as in reading byte by byte.
        backslash, quote = _MARKS["\x01" in text or "\x02" in text]
        text = text.replace("\\\\", backslash).replace('\\"', quote)
        if "\\" in text:
            text = text.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
            if "\\" in text:
                raise _Unreadable("unknown escape in a string")
    pieces = text.split('"')
    strings = pieces[1::2]
    if len(strings) == len(pieces[0::2]):
        raise _Unreadable("end of text in a string")
    if quote and strings:
        text = _STRING.join(strings).replace(backslash, "\\").replace(quote, '"')
        strings = text.split(_STRING)
    # What is left between the strings decides how they belong together.
    sections = _STRING.join(pieces[0::2]).split("],[")
    if len(sections) != 4:
        raise _Unreadable("not of the form Derive([...],[...],[...],...,...,[...],[...])")
    outputs, inputs, middle, environment = sections
    sources, found, arguments = middle.partition(f"],{_STRING},{_STRING},[")
    if not outputs.startswith("Derive([") or not found or not environment.endswith("])"):
        raise _Unreadable("not of the form Derive([...],[...],[...],...,...,[...],[...])")
    n_outputs = _tuples(outputs[8:], 4, "outputs")
    id_counts = _input_lists(inputs)
    n_sources = _tuples(sources, 1, "sources")
    n_arguments = _tuples(arguments, 1, "arguments")
    n_environment = _tuples(environment[:-2], 2, "environment")

    end = 4 * n_outputs
    parsed_outputs = {
        name: Output(_path(path, store), algorithm, digest)
        for name, path, algorithm, digest in zip(
            *[strings[field:end:4] for field in range(4)], strict=True
        )
    }
    parsed_inputs: dict[StorePath, tuple[str, ...]] = {}
    for count in id_counts:
        parsed_inputs[_path(strings[end], store)] = tuple(strings[end + 1 : end + 1 + count])
        end += 1 + count
    parsed_sources = tuple([_path(s, store) for s in strings[end : end + n_sources]])
    end += n_sources
    platform, builder = strings[end : end + 2]
    end += 2
    parsed_arguments = tuple(strings[end : end + n_arguments])
    end += n_arguments
    parsed_environment = dict(zip(strings[end::2], strings[end + 1 :: 2], strict=True))
    if (
        len(parsed_outputs) != n_outputs
        or len(parsed_inputs) != len(id_counts)
        or len(parsed_environment) != n_environment
    ):
        raise _Unreadable("an output, input or variable occurs twice")
    return Derivation(
        parsed_outputs,
        parsed_inputs,
        parsed_sources,
        platform,
        builder,
        parsed_arguments,
        parsed_environment,
    )


def _tuples(skeleton: str, width: int, what: str) -> int:
    """Return how many tuples of WIDTH strings SKELETON is a list of."""
    count = skeleton.count(_STRING) // width
    entry = ",".join([_STRING] * width)
    if width > 1:
        entry = f"({entry})"
    if skeleton != ",".join([entry] * count):
        raise _Unreadable(f"malformed list of {what}")
    return count


def _input_lists(skeleton: str) -> list[int]:
    """Return the lengths of the lists of output names in the list of inputs."""
    if not skeleton:
        return []
    if not (skeleton.startswith("(") and skeleton.endswith(")")):
        raise _Unreadable("malformed list of inputs")
    counts = []
    for entry in skeleton[1:-1].split("),("):
        if not (entry.startswith(f"{_STRING},[") and entry.endswith("]")):
            raise _Unreadable("malformed list of inputs")
        counts.append(_tuples(entry[3:-1], 1, "input's output names"))
    return counts


def _path(text: str, store: StoreDirectory) -> StorePath:
    directory, _, base = text.rpartition("/")
    if directory != store.path or not base:
        raise _Unreadable(f"bad path '{text}'")
    return StorePath(text)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _sorted(texts: Iterable[_Text]) -> list[_Text]:
    """Sort as bytes are; code points do so too, but for bytes that are no UTF-8."""
    ordered = sorted(texts)
    if len(ordered) > 1 and not "".join(ordered).isascii():
        ordered.sort(key=_bytes)
    return ordered


def serialise(drv: Derivation) -> bytes:
    """Write DRV in its canonical form."""
    return _serialise(drv, drv.inputs, drv.environment)


def _serialise(
    drv: Derivation,
    inputs: Mapping[_Text, tuple[str, ...]],
    environment: Mapping[str, str],
    masked: bool = False,
) -> bytes:
    # NUL, which no string may have, stands for quotes until all is escaped at once.
    outputs = []
    for name in _sorted(drv.outputs):
        output = drv.outputs[name]
        path = "" if masked else output.path
        outputs.append(f"(\0{name}\0,\0{path}\0,\0{output.algorithm}\0,\0{output.hash}\0)")
    used = [f"(\0{key}\0,{_list(_sorted(set(inputs[key])))})" for key in _sorted(inputs)]
    variables = [f"(\0{name}\0,\0{environment[name]}\0)" for name in _sorted(environment)]
    text = (
        f"Derive([{','.join(outputs)}],[{','.join(used)}],{_list(_sorted(set(drv.sources)))},"
        f"\0{drv.platform}\0,\0{drv.builder}\0,{_list(drv.arguments)},[{','.join(variables)}])"
    )
    for raw, escape in _ESCAPES:
        if raw in text:
            text = text.replace(raw, escape)
    return text.replace("\0", '"').encode("utf-8", "surrogateescape")


def _list(strings: Collection[str]) -> str:
    return "[\0" + "\0,\0".join(strings) + "\0]" if strings else "[]"


# --- hashes and output paths --------------------------------------------------


def _hashed_inputs(drv: Derivation, input_hash: InputHash) -> dict[str, tuple[str, ...]]:
    # Inputs that differ only in how something fixed is fetched have one hash; the
    # entry of the last name counts, others are dropped (§3.2).
    return {input_hash(path).hex(): drv.inputs[path] for path in _sorted(drv.inputs)}


def hash_modulo(drv: Derivation, input_hash: InputHash) -> bytes:
    """Return the 32 bytes that stand for DRV in derivations that use it (§3).

    :param input_hash: gives this hash of each input; see `HashCache`.
    """
    if drv.is_fixed:
        out = drv.outputs["out"]
        text = _bytes(f"fixed:out:{out.algorithm}:{out.hash}:{out.path}")
    else:
        text = _serialise(drv, _hashed_inputs(drv, input_hash), drv.environment)
    return hashlib.sha256(text).digest()


def masked_hash(drv: Derivation, input_hash: InputHash) -> bytes:
    """Return the hash that names the outputs of DRV: its own paths do not count (§4)."""
    environment = {**drv.environment, **dict.fromkeys(drv.outputs, "")}
    text = _serialise(drv, _hashed_inputs(drv, input_hash), environment, masked=True)
    return hashlib.sha256(text).digest()


def compute_output_paths(
    drv: Derivation, name: str, store: StoreDirectory, input_hash: InputHash
) -> dict[str, StorePath]:
    """Return the paths that the outputs of DRV must have (§4).

    :param name: of the derivation, see `derivation_name`.
    :raises BadHash: a fixed output's hash has not its form.
    :raises BadName: NAME or an output's name has characters that are not allowed.
    """
    if drv.is_fixed:
        out = drv.outputs["out"]
        path = store.fixed_path(name, out.hash_algorithm, out.is_recursive, out.digest())
        return {"out": path}
    if not drv.outputs:
        return {}
    digest = masked_hash(drv, input_hash)
    return {output: store.output_path(output, digest, name) for output in drv.outputs}


def check(
    drv: Derivation,
    path: StorePath,
    store: StoreDirectory,
    input_hash: InputHash,
    references: Collection[StorePath] | None = None,
) -> None:
    """Test that DRV, which is to be registered as PATH, tells the truth (§5).

    :param references: of PATH; they must include the inputs and sources, so that
        a live derivation cannot lose them.  `None` to leave that out.
    :raises BadDerivation: "incorrect output ... should be ...", or a reference is missing.
    :raises BadHash: a fixed output has an unknown algorithm or a malformed hash.
    """
    expected = compute_output_paths(drv, derivation_name(path), store, input_hash)
    for name, right in expected.items():
        for given in drv.outputs[name].path, drv.environment.get(name):
            if given != right:
                raise BadDerivation(
                    f"derivation '{path}' has incorrect output '{given or ''}' for '{name}',"
                    f" should be '{right}'"
                )
    if references is not None:
        missing = drv.references.difference(references)
        if missing:
            raise BadDerivation(
                f"derivation '{path}' uses '{_sorted(missing)[0]}' without a reference to it"
            )


class HashCache:
    """Computes modulo hashes of whole graphs of derivations, without recursion.

    :param read: gives the derivation at a path, or raises; it is asked once for each.
    :param known: what was computed before; grows.
    """

    def __init__(
        self,
        read: Callable[[StorePath], Derivation],
        known: MutableMapping[StorePath, bytes] | None = None,
    ) -> None:
        self._read = read
        self.known: MutableMapping[StorePath, bytes] = {} if known is None else known

    def __call__(self, path: StorePath) -> bytes:
        """Return the modulo hash of the derivation at PATH.

        :raises BadDerivation: the graph has a circle; and what `read` raises.
        """
        known = self.known
        digest = known.get(path)
        if digest is not None:
            return digest
        found: dict[StorePath, bytes] = {}

        def ready(wanted: StorePath) -> bytes:
            return known[wanted] if wanted in known else found[wanted]

        # A derivation stays on the stack, below its inputs, until these are done.
        open_: dict[StorePath, Derivation] = {}
        stack = [path]
        while stack:
            top = stack[-1]
            if top in found or top in known:
                stack.pop()
                continue
            drv = open_.get(top)
            if drv is None:
                drv = open_[top] = self._read(top)
                if not drv.is_fixed:
                    missing = [i for i in drv.inputs if i not in known and i not in found]
                    if not open_.keys().isdisjoint(missing):
                        raise BadDerivation(f"derivation '{top}' depends on itself")
                    if missing:
                        stack += missing
                        continue
            found[top] = hash_modulo(drv, ready)
            del open_[top]
            stack.pop()
        known.update(found)
        return found[path]
