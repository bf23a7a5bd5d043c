"""What clients do while the daemon is killed: requests whose outcome is known.

All of it can be done again after a crash, with the same outcome.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import TypeAlias

from guixd.build.request import BuildMode
from guixd.client import Client, RequestFailed
from guixd.formats.path import StorePath
from guixd.formats.wire import encode_bytes, encode_int
from guixd.signatures import KeyPair, sign
from tests.archives import File, Link, Tree, archive
from tests.crash.items import Items, Recipe
from tests.service.world import set_options
from tests.signatures.offers import narinfo_of

Task: TypeAlias = Callable[[Client], Awaitable[None]]
"""One or a few requests; an error or a wrong reply is an exception."""

DELETE_DEAD, DELETE_THESE = 2, 3
EXPORTED = 0x4558494E
"""What follows the archive of an exported item."""
BLOCK = 40_000
"""Bytes in which archives are sent."""


def same(found: object, wanted: object) -> None:
    """Raise AssertionError unless the two are equal."""
    if found != wanted:
        raise AssertionError(f"{found!r} instead of {wanted!r}")


class Work:
    """Makes tasks.

    :param items: what they make.
    :param directory: where links to items are put, in `links`, and substitutes, in `mirror`.
    :param database: the file of the database.
    :param keys: with which archives are signed.
    :param random: decides what each task is about.
    :param label: part of all names, so that nothing is there already.
    :param stranger: connects as a user that the daemon does not trust, if it can.
    """

    def __init__(
        self,
        items: Items,
        directory: str,
        database: str,
        keys: KeyPair,
        random: Random,
        label: str,
        stranger: Callable[[], Awaitable[Client]],
    ) -> None:
        self._items = items
        self._stranger = stranger
        self._directory = directory
        self._database = database
        self._keys = keys
        self._random = random
        self._label = label
        self._number = 0
        self._makers: tuple[Callable[[], Iterator[Task]], ...] = (
            self.small_texts, self.large_text, self.tree, self.stream, self.flat_file, self.roots,
            self.build, self.fixed_build, self.failing_build, self.checked_build,
            self.repairing_build, self.optimise, self.verify, self.lose, self.forget, self.collect,
            self.delete, self.import_, self.export, self.queries, self.substitute,
        )  # fmt: skip

    def script(self, length: int) -> list[Task]:
        """Return the tasks of one client, in their order; later ones use what earlier ones made."""
        return [task for _ in range(length) for task in self._random.choice(self._makers)()]

    def everything(self) -> list[Task]:
        """Return tasks of all kinds."""
        return [task for make in self._makers for task in make()]

    def _name(self, kind: str) -> str:
        self._number += 1
        return f"{kind}-{self._label}-{self._number}"

    def _shared(self) -> bytes:
        """Return one of few contents that are large enough to be shared."""
        return bytes([self._random.randrange(4)]) * 9000

    # --- adding --------------------------------------------------------------------

    def small_texts(self) -> Iterator[Task]:
        last: StorePath | None = None
        for _ in range(3):
            name = self._name("text")
            yield self._add_text(name, name.encode(), () if last is None else (last,))
            last = self._items.text(name, name.encode(), () if last is None else (last,))

    def large_text(self) -> Iterator[Task]:
        yield self._add_text(self._name("large"), self._random.randbytes(300_000), ())

    def _add_text(self, name: str, text: bytes, references: tuple[StorePath, ...]) -> Task:
        path = self._items.text(name, text, references)

        async def add(client: Client) -> None:
            same(await client.add_text(name, text, references), path)
            self._items.promise(path)

        return add

    def tree(self) -> Iterator[Task]:
        tree: Tree = {
            b"a": File(self._name("contents").encode(), executable=True),
            b"b": {b"link": Link(b"../a"), b"shared": File(self._shared())},
            b"c": File(self._shared()),
        }
        yield self._add_tree(self._name("tree"), tree)

    def stream(self) -> Iterator[Task]:
        """A tree that comes in many pieces."""
        files: dict[bytes, Tree] = {
            b"%d" % number: File(self._random.randbytes(50_000)) for number in range(4)
        }
        yield self._add_tree(self._name("stream"), {**files, b"shared": File(self._shared())})

    def flat_file(self) -> Iterator[Task]:
        yield self._add_tree(self._name("flat"), File(self._random.randbytes(10_000)), flat=True)

    def _add_tree(self, name: str, tree: Tree, *, flat: bool = False) -> Task:
        path, nar = self._items.tree(name, tree, flat=flat), archive(tree)
        blocks = [nar[start : start + BLOCK] for start in range(0, len(nar), BLOCK)]

        async def add(client: Client) -> None:
            same(await client.add_nar(name, blocks, recursive=not flat), path)
            self._items.promise(path)

        return add

    def import_(self) -> Iterator[Task]:
        """Two items of one stream, the second of which refers to the first."""
        tree: Tree = {b"a": File(self._shared()), b"b": File(self._random.randbytes(60_000))}
        first = self._items.tree(self._name("imported"), tree)
        text = self._name("imported").encode()
        second = self._items.text(text.decode(), text, (first,))
        stream = [
            self._signed(first, archive(tree), ()),
            self._signed(second, archive(File(text)), (first,)),
            encode_int(0),
        ]

        async def import_(client: Client) -> None:
            same(await client.import_paths(stream), (first, second))
            self._items.promise(first)
            self._items.promise(second)

        yield import_

    def _signed(self, path: StorePath, nar: bytes, references: tuple[StorePath, ...]) -> bytes:
        """Return an item as it is in a stream of exported ones."""
        described = [encode_bytes(str(item).encode()) for item in references]
        body = [nar, encode_int(EXPORTED), encode_bytes(str(path).encode())]
        body += [encode_int(len(references)), *described, encode_bytes(b"")]
        data = b"".join(body)
        signature = sign(hashlib.sha256(data).digest(), self._keys)
        return encode_int(1) + data + encode_int(1) + encode_bytes(signature)

    def export(self) -> Iterator[Task]:
        name = self._name("exported")
        tree: Tree = {b"a": File(self._random.randbytes(100_000))}
        path, nar = self._items.tree(name, tree), archive(tree)

        async def export(client: Client) -> None:
            same(await client.add_nar(name, [nar]), path)
            written = bytearray()
            await client.export_path(path, written.extend)
            same(bytes(written[: len(nar)]) == nar, True)

        yield export

    def substitute(self) -> Iterator[Task]:
        """An item and what it refers to, which the daemon's server has; one is spoilt then."""
        tree: Tree = {b"a": File(self._shared()), b"b": File(self._random.randbytes(60_000))}
        first = self._items.tree(self._name("substitute"), tree)
        text = self._name("substitute").encode()
        second = self._items.text(text.decode(), text, (first,))
        self._offer(first, archive(tree), ())
        self._offer(second, archive(File(text)), (first,))

        async def substitute(client: Client) -> None:
            await client.ensure_path(second)
            self._items.promise(first)
            self._items.promise(second)

        yield substitute

        async def repair(client: Client) -> None:
            await substitute(client)
            _spoil(Path(second))
            await client.build_paths([second], BuildMode.REPAIR)
            same(Path(second).read_bytes(), text)

        yield repair

    def _offer(self, path: StorePath, nar: bytes, references: tuple[StorePath, ...]) -> None:
        """Let the daemon's server have an item."""
        mirror = Path(self._directory, "mirror")
        (mirror / "nar" / path.base).write_bytes(nar)
        text = narinfo_of(path, nar, references, keys=self._keys)
        (mirror / f"{path.hash_part}.narinfo").write_bytes(text)

    # --- building ------------------------------------------------------------------

    def build(self) -> Iterator[Task]:
        """Two derivations, one of which uses the other's two outputs."""
        first = self._items.derive(
            self._name("first"),
            "mkdir $out $lib; yes x | head -c 20000 > $lib/data; echo $lib > $out/lib",
            outputs=("out", "lib"),
        )
        out, lib = first.outputs["out"], first.outputs["lib"]
        self._items.make(lib, {b"data": File(b"x\n" * 10_000)})
        self._items.make(out, {b"lib": File(f"{lib}\n".encode())}, (lib,))
        second = self._items.derive(
            self._name("second"), f"cat {out}/lib {lib}/data > $out", inputs=[first]
        )
        path = second.outputs["out"]
        self._items.make(path, File(f"{lib}\n".encode() + b"x\n" * 10_000), (lib,))
        yield self._build(first, second)

    def fixed_build(self) -> Iterator[Task]:
        name = self._name("fixed")
        contents = f"{name}\n".encode()
        recipe = self._items.derive(name, "echo $name > $out", fixed=contents)
        self._items.make(recipe.outputs["out"], File(contents))
        yield self._build(recipe)

    def _build(self, *recipes: Recipe) -> Task:
        """Add RECIPES and build the last one."""

        async def build(client: Client) -> None:
            await self._add_recipes(client, recipes)
            last = recipes[-1]
            await client.build_paths([last.path])
            for output in last.outputs.values():
                same(await client.is_valid_path(output), True)
                self._items.promise(output)

        return build

    async def _add_recipes(self, client: Client, recipes: tuple[Recipe, ...]) -> None:
        same(await client.add_nar("tools", [archive(self._items.tools_tree)]), self._items.tools)
        for recipe in recipes:
            name = recipe.path.name
            same(await client.add_text(name, recipe.text, recipe.references), recipe.path)

    def failing_build(self) -> Iterator[Task]:
        """A build that leaves an output and fails, whose directory is kept."""
        recipe = self._items.derive(self._name("failing"), "mkdir $out; echo > $out/x; exit 3")

        async def build(client: Client) -> None:
            await self._add_recipes(client, (recipe,))
            stranger = await self._stranger()
            try:
                await stranger.set_options(set_options(keep_failed=True))
                await stranger.build_paths([recipe.path])
            except RequestFailed as error:
                same(error.status, 100)
            else:
                raise AssertionError("the build did not fail")
            finally:
                await stranger.close()

        yield build

    def checked_build(self) -> Iterator[Task]:
        """A build that is done again, to be compared."""
        recipe = self._simple("checked")
        yield self._build(recipe)

        async def check(client: Client) -> None:
            await client.build_paths([recipe.path], BuildMode.CHECK)

        yield check

    def repairing_build(self) -> Iterator[Task]:
        """A build whose output is spoilt and then repaired by another build."""
        recipe = self._simple("repaired")
        out = Path(recipe.outputs["out"])

        async def repair(client: Client) -> None:
            await self._build(recipe)(client)
            _spoil(out)
            await client.build_paths([recipe.path], BuildMode.REPAIR)

        yield repair

    def _simple(self, kind: str) -> Recipe:
        name = self._name(kind)
        recipe = self._items.derive(name, "echo $name > $out")
        self._items.make(recipe.outputs["out"], File(f"{name}\n".encode()))
        return recipe

    # --- the whole store, roots and queries --------------------------------------

    def optimise(self) -> Iterator[Task]:
        yield lambda client: client.optimise_store()

    def verify(self) -> Iterator[Task]:
        """An output that is spoilt, and repaired when the whole store is verified."""
        recipe = self._simple("verified")
        out = Path(recipe.outputs["out"])
        wanted = f"{recipe.path.name.removesuffix('.drv')}\n"

        async def verify(client: Client) -> None:
            await self._build(recipe)(client)
            _spoil(out)
            # What others have just spoilt may make the result an error.
            await client.verify_store(check_contents=True, repair=True)
            same(out.read_text(), wanted)

        yield verify

    def lose(self) -> Iterator[Task]:
        """An item whose file is lost, which verification finds, and which is added again."""
        name = self._name("lost")
        path = self._items.text(name, b"lost")

        async def lose(client: Client) -> None:
            same(await client.add_text(name, b"lost"), path)
            Path(path).unlink(missing_ok=True)  # it may be lost since the last time
            await client.verify_store()
            same(await client.is_valid_path(path), False)
            same(await client.add_text(name, b"lost"), path)

        yield lose

    def forget(self) -> Iterator[Task]:
        """An item whose size the database does not know until all is verified."""
        name = self._name("forgotten")
        path = self._items.text(name, b"")

        async def forget(client: Client) -> None:
            same(await client.add_text(name, b""), path)
            with closing(sqlite3.connect(self._database)) as database, database:
                database.execute("UPDATE ValidPaths SET narSize = NULL WHERE path = ?", (path,))
            await client.verify_store(check_contents=True)
            same((await client.path_info(path)).nar_size, self._items.expected[path].nar_size)

        yield forget

    def collect(self) -> Iterator[Task]:
        """A collection, with what somebody else is just making dead at hand."""
        yield from self.small_texts()

        async def collect(client: Client) -> None:
            self._items.collections += 1
            self._items.promised.clear()
            try:
                await client.collect_garbage(DELETE_DEAD)
            finally:
                self._items.collections -= 1

        yield collect

    def delete(self) -> Iterator[Task]:
        """An item that is deleted by its name."""
        name = self._name("deleted")
        tree: Tree = {b"a": {b"b": File(self._shared())}}
        path = self._items.tree(name, tree)

        async def delete(client: Client) -> None:
            same(await client.add_nar(name, [archive(tree)]), path)
            gone = True
            try:
                await client.collect_garbage(DELETE_THESE, [path])
            except RequestFailed as error:
                # Somebody else may just be looking whether it can be shared.
                gone = "still alive" not in error.text
                same((gone, error.text), (False, error.text))
            same(await client.is_valid_path(path), not gone)

        yield delete

    def roots(self) -> Iterator[Task]:
        name = self._name("root")
        path = self._items.text(name, b"", ())
        link = f"{self._directory}/links/{name}"

        async def root(client: Client) -> None:
            same(await client.add_text(name, b""), path)
            if not os.path.islink(link):
                os.symlink(path, link)
            await client.add_temp_root(path)
            await client.add_indirect_root(link)
            same((link, path) in await client.find_roots(), True)

        yield root

    def queries(self) -> Iterator[Task]:
        async def ask(client: Client) -> None:
            paths = await client.all_valid_paths()
            same(set(paths) - set(self._items.expected), set())
            some = paths[:5]
            for path in some:
                await client.add_temp_root(path)  # else it could be collected
            for path in await client.valid_paths(some):
                info = await client.path_info(path)
                same(info.nar_hash, self._items.expected[path].nar_hash)

        yield ask


def _spoil(file: Path) -> None:
    file.chmod(0o644)
    file.write_text("spoilt")
