"""Store items whose contents and references are known before any daemon makes them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from guixd.formats import derivation
from guixd.formats.derivation import Derivation, HashCache, Output
from guixd.formats.path import StoreDirectory, StorePath
from guixd.settings import this_system
from tests.archives import File, Link, Tree, archive

BUSYBOX = "/bin/busybox"
TOOLS = ("sh", "cat", "head", "mkdir", "yes")


@dataclass(frozen=True)
class Expected:
    """What an item is, if it is valid."""

    nar_hash: str
    nar_size: int
    references: frozenset[StorePath]


@dataclass(frozen=True)
class Recipe:
    """A derivation with its text, and what its outputs will be."""

    path: StorePath
    text: bytes
    references: tuple[StorePath, ...]
    outputs: Mapping[str, StorePath]


class Items:
    """All items that the clients of one store ever make.

    :ivar expected: what each of them is.
    :ivar promised: those that the daemon has said are valid, since the last collection.
    :ivar collections: how many are running, in which what nobody uses any more may go.
    """

    def __init__(self, store: StoreDirectory) -> None:
        self.store = store
        self.expected: dict[StorePath, Expected] = {}
        self.promised: set[StorePath] = set()
        self.collections = 0
        self._derivations: dict[StorePath, Derivation] = {}
        self._hashes: dict[StorePath, bytes] = {}
        busybox = File(Path(BUSYBOX).read_bytes(), executable=True)
        links: dict[bytes, Tree] = {tool.encode(): Link(b"busybox") for tool in TOOLS}
        self.tools_tree: Tree = {b"bin": {b"busybox": busybox, **links}}
        self.tools = self.tree("tools", self.tools_tree)

    def _expect(
        self, path: StorePath, tree: Tree, references: Collection[StorePath] = ()
    ) -> StorePath:
        nar = archive(tree)
        digest = hashlib.sha256(nar).hexdigest()
        self.expected[path] = Expected(digest, len(nar), frozenset(references))
        return path

    def text(self, name: str, text: bytes, references: Collection[StorePath] = ()) -> StorePath:
        """Return the path of a text."""
        path = self.store.text_path(name, hashlib.sha256(text).digest(), references)
        return self._expect(path, File(text), references)

    def tree(self, name: str, tree: Tree, *, flat: bool = False) -> StorePath:
        """Return the path of a source tree, or of a file that is hashed FLAT."""
        data = tree.contents if flat and isinstance(tree, File) else archive(tree)
        digest = hashlib.sha256(data).digest()
        return self._expect(self.store.fixed_path(name, "sha256", not flat, digest), tree)

    def derive(
        self,
        name: str,
        script: str,
        *,
        inputs: Collection[Recipe] = (),
        outputs: Collection[str] = ("out",),
        fixed: bytes | None = None,
    ) -> Recipe:
        """Return a derivation that runs SCRIPT.

        :param inputs: derivations, all of whose outputs it uses.
        :param fixed: the contents of its output, which is a flat file then.
        """
        none = self.store.child("0" * 32 + "-none")
        kind = ("", "") if fixed is None else ("sha256", hashlib.sha256(fixed).hexdigest())
        variables = {"name": name, "PATH": f"{self.tools}/bin"}
        drv = Derivation(
            outputs={output: Output(none, *kind) for output in outputs},
            inputs={recipe.path: tuple(recipe.outputs) for recipe in inputs},
            sources=(self.tools,),
            platform=this_system(),
            builder=f"{self.tools}/bin/sh",
            arguments=("-e", "-c", script),
            environment=variables,
        )
        cache = HashCache(self._derivations.__getitem__, self._hashes)
        paths = derivation.compute_output_paths(drv, name, self.store, cache)
        drv = replace(
            drv,
            outputs={output: Output(paths[output], *kind) for output in outputs},
            environment={**variables, **paths},
        )
        text = derivation.serialise(drv)
        references = (*drv.inputs, *drv.sources)
        path = self.text(f"{name}.drv", text, references)
        self._derivations[path] = drv
        return Recipe(path, text, references, paths)

    def promise(self, path: StorePath) -> None:
        """The daemon has said that PATH is valid."""
        if not self.collections:
            self.promised.add(path)

    def make(self, path: StorePath, tree: Tree, references: Collection[StorePath] = ()) -> None:
        """Expect TREE as the output PATH of a derivation."""
        self._expect(path, tree, references)
