"""The points at which the daemon can be killed, as its own code names them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import guixd

SOURCES = Path(guixd.__file__).parent


def points() -> frozenset[str]:
    """Return the names in all calls of `reached` in guixd."""
    return frozenset(name for source in SOURCES.rglob("*.py") for name in _names(source))


def _names(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text())):
        match node:
            case ast.Call(func=ast.Name(id="reached"), args=[ast.Constant(value=str(name))]):
                yield name
            case ast.Call(func=ast.Name(id="reached")):
                raise AssertionError(f"{source}:{node.lineno}: no constant as the name of a point")
