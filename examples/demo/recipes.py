"""The three derivations of the demo, made as a client of the daemon would make them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from guixd.formats.derivation import Derivation, HashCache, Output, compute_output_paths, serialise
from guixd.formats.path import StoreDirectory, StorePath
from guixd.settings import this_system

BUILDERS = Path(__file__).parent / "builders"


@dataclass(frozen=True)
class Recipe:
    """A derivation with its place in the store."""

    path: StorePath
    derivation: Derivation

    @property
    def text(self) -> bytes:
        return serialise(self.derivation)

    @property
    def output(self) -> StorePath:
        return self.derivation.outputs["out"].path

    @property
    def name(self) -> str:
        return self.derivation.environment["name"]


class Cookbook:
    """Makes recipes that all use the host's shell as it lies in the store."""

    def __init__(self, store: StoreDirectory, tools: StorePath) -> None:
        self.recipes: list[Recipe] = []
        self._store = store
        self._tools = tools
        self._hash = HashCache(self._read)

    def _read(self, path: StorePath) -> Derivation:
        return next(recipe.derivation for recipe in self.recipes if recipe.path == path)

    @staticmethod
    def script(name: str) -> tuple[str, bytes]:
        """Return the name and text of the builder of NAME."""
        parts = [(BUILDERS / part).read_bytes() for part in ("prelude.sh", f"{name}.sh")]
        return f"build-{name}.sh", b"\n".join(parts)

    def add(
        self,
        name: str,
        script: StorePath,
        sources: Mapping[str, StorePath] | None = None,
        inputs: Mapping[str, Recipe] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Recipe:
        """Add a derivation that runs SCRIPT.

        The outputs of INPUTS, SOURCES and VARIABLES are in its environment under their names.
        """
        sources, inputs, tools = dict(sources or {}), dict(inputs or {}), self._tools
        environment = {
            "name": name,
            "tools": str(tools),
            **{variable: str(path) for variable, path in sources.items()},
            **{variable: str(recipe.output) for variable, recipe in inputs.items()},
            **(variables or {}),
        }
        unnamed = Derivation(
            outputs={"out": Output(StorePath(""))},
            inputs={recipe.path: ("out",) for recipe in inputs.values()},
            sources=tuple(sorted({tools, script, *sources.values()})),
            platform=this_system(),
            builder=f"{tools}/bin/ld.so",
            arguments=("--library-path", f"{tools}/lib", f"{tools}/bin/sh", str(script)),
            environment=environment,
        )
        output = compute_output_paths(unnamed, name, self._store, self._hash)["out"]
        derivation = replace(
            unnamed,
            outputs={"out": Output(output)},
            environment={**environment, "out": str(output)},
        )
        digest = hashlib.sha256(serialise(derivation)).digest()
        path = self._store.text_path(f"{name}.drv", digest, derivation.references)
        recipe = Recipe(path, derivation)
        self.recipes.append(recipe)
        return recipe
