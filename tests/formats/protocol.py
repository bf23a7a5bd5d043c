"""Hypothesis strategies for everything that goes over the wire."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from guixd.formats import operations, wire
from guixd.formats.operations import OPERATIONS, Operation, Optional, Record
from guixd.formats.path import StoreDirectory, StorePath
from guixd.formats.wire import Kind

STORE = StoreDirectory()

texts = st.one_of(
    st.text(max_size=20),
    st.binary(max_size=20).map(lambda data: data.decode("utf-8", "surrogateescape")),
)
paths = st.text("abcdef0123456789-.+ é", max_size=40).map(lambda name: STORE.child("x" + name))
minors = st.sampled_from(
    (0x00, 0x02, 0x04, 0x05, 0x06, 0x07, 0x0A, 0x0B, 0x0C, 0x0E, 0x0F, 0x60, 0x61, 0x64, 0xFF)
)

_SIMPLE: dict[Kind[Any], st.SearchStrategy[Any]] = {
    wire.INT: st.integers(0, 2**32 - 1),
    wire.LONG: st.integers(0, 2**64 - 1),
    wire.FLAG: st.booleans(),
    wire.ONE: st.booleans(),
    wire.DONE: st.none(),
    wire.NOTHING: st.none(),
    wire.NAME: texts,
    wire.OPTION: texts,
    wire.TEXT: st.binary(max_size=100),
    wire.PATH: paths,
    wire.OPTIONAL_PATH: st.none() | paths,
    wire.NAMES: st.lists(texts, max_size=4).map(tuple),
    wire.NAME_SET: st.lists(texts, max_size=4).map(lambda v: tuple(wire.in_byte_order(v))),
    wire.PATHS: st.lists(paths, max_size=4).map(lambda v: tuple(wire.in_byte_order(v))),
    wire.PATHS_IN_ORDER: st.lists(paths, max_size=4).map(tuple),
    wire.PAIRS: st.lists(st.tuples(texts, texts), max_size=4).map(tuple),
}


def values_of(kind: Kind[Any], minor: int) -> st.SearchStrategy[Any]:
    """Return values of KIND."""
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    if isinstance(kind, Optional):
        return st.none() | values_of(kind._full, minor)
    if isinstance(kind, wire.List):
        return st.lists(values_of(kind._kind, minor), max_size=3).map(tuple)
    assert isinstance(kind, Record)
    return instances_of(kind._cls, minor)


def instances_of(cls: type, minor: int) -> st.SearchStrategy[Any]:
    """Return values of a class whose annotations say how it goes over the wire."""
    layout = operations._layout(cls, minor)
    return st.builds(cls, **{name: values_of(kind, minor) for name, kind in layout})


requests: st.SearchStrategy[tuple[int, Operation[Any]]] = minors.flatmap(
    lambda minor: st.tuples(
        st.just(minor),
        st.sampled_from(sorted(OPERATIONS)).flatmap(
            lambda opcode: instances_of(OPERATIONS[opcode], minor)
        ),
    )
)
"""Pairs of a minor version and a request that a client of it can send."""


def path(name: str = "a") -> StorePath:
    """Return some store path."""
    return STORE.child("bjfjcd0iwaqp6ckwlrd6qim7hjaa5ngi-" + name)
