"""Substitutes, from a server near by and from one far away."""

from __future__ import annotations

import base64
import shutil
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from bench import items
from bench.harness import Daemon
from bench.server import Server, fresh
from bench.workloads.base import Metric, Workload, delete, timed
from guixd.formats import sexp
from guixd.signatures.keys import KeyPair
from guixd.signatures.signing import sign

_KEYS = KeyPair(
    sexp.parse(items.KEYS["signing-key.sec"].encode()), sexp.parse(items.PUBLIC_KEY.encode())
)


def publish(files: Path, store: str, name: str, chunks: list[bytes]) -> str:
    """Put an item with a signed narinfo where a server finds it; return its path."""
    digest = sha256(b"".join(chunks)).digest()
    path = items.store_path(store, "source", digest.hex(), name)
    base = path.rpartition("/")[2]
    size = sum(map(len, chunks))
    text = (
        f"StorePath: {path}\nNarHash: sha256:{items.base32(digest)}\n"
        f"NarSize: {size}\nReferences: \n"
    )
    signature = sign(sha256(text.encode()).digest(), _KEYS)
    text += f"Signature: 1;bench;{base64.b64encode(signature).decode()}\n"
    text += f"URL: nar/{base}\nCompression: none\nFileSize: {size}\n"
    (files / f"{base[:32]}.narinfo").write_text(text)
    (files / "nar").mkdir(exist_ok=True)
    with (files / "nar" / base).open("wb") as file:
        file.writelines(chunks)
    return path


class Substitutes(Workload):
    """W12: substitutes."""

    METRICS: ClassVar = {
        "query 50 substitutable paths, first": Metric("ms", more=False, ratio=10),
        "query 50 others, new connection": Metric("ms", more=False, ratio=10),
        "substitute 50 small items": Metric("ms", more=False, ratio=10),
        "substitute one small item, new connection": Metric("ms", more=False, ratio=10),
        "substitute 256 MiB": Metric("MiB/s", ratio=2),
    }
    options = ("--disable-chroot",)
    repetitions = 3
    delay = 0.0
    many = 50
    """How many more items there are information about."""

    def prepare(self, daemon: Daemon) -> None:
        files = fresh(daemon.directory / "files")
        size = self.count(256, 4)
        small = [
            publish(files, daemon.store, f"small-{n}", [items.nar(items.nar_file(b"%d" % n))])
            for n in range(self.count(50, 5) + self.count(self.many, 0))
        ]
        big = publish(files, daemon.store, "big", list(items.big_file(size, 3)))
        split = self.count(50, 5)
        daemon.facts.update(
            size=size, big=big, small=small[:split], more=small[split:],
            server=Server(files, self.delay),
        )  # fmt: skip

    def finish(self, daemon: Daemon) -> None:
        server = daemon.facts.pop("server", None)
        if server is not None:
            server.stop()

    def _forget(self, daemon: Daemon) -> None:
        """Delete the items and all that was learnt about them."""
        delete(daemon, [daemon.facts["big"], *daemon.facts["small"]])
        shutil.rmtree(daemon.directory / "state/substitute", ignore_errors=True)
        shutil.rmtree(daemon.directory / "home/.cache", ignore_errors=True)
        daemon.restart()  # what a daemon has in memory

    def _measure(self, daemon: Daemon) -> list[float]:
        facts = daemon.facts
        url, small, big = facts["server"].url, facts["small"], facts["big"]
        figures = []
        with daemon.connect(substitute_urls=url) as client:
            figures.append(timed(lambda: client.substitutable(small)))
            assert sorted(client.substitutable(small)) == sorted(small)
        others = facts["more"][:50]
        with daemon.connect(substitute_urls=url) as client:
            figures.append(timed(lambda: client.substitutable(others)))
            assert sorted(client.substitutable(others)) == sorted(others)
        with daemon.connect(substitute_urls=url) as client:
            figures.append(timed(lambda: client.build(small[1:])))
            assert len(client.valid_paths(small[1:])) == len(small) - 1
        assert Path(small[3]).read_bytes() == b"3"
        with daemon.connect(substitute_urls=url) as client:
            figures.append(timed(lambda: client.ensure(small[0])))
            assert client.is_valid(small[0])
        with daemon.connect(substitute_urls=url) as client:
            figures.append(1000 * facts["size"] / timed(lambda: client.ensure(big)))
            assert client.is_valid(big)
        return figures

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        figures = self._measure(daemon)
        self._forget(daemon)
        return dict(zip(self.METRICS, figures, strict=True))


class DistantSubstitutes(Substitutes):
    """W12: the same over a connection with 50 ms from here to there and back."""

    METRICS: ClassVar = {
        "substitute 50 small items, 50 ms away": Metric("ms", more=False, ratio=10),
        "substitute one small item, 50 ms away": Metric("ms", more=False),
        "look 2,000 paths up, 50 ms away": Metric("ms", more=False, ratio=3),
    }
    delay = 0.025
    many = 2050

    def run(self, daemon: Daemon, repetition: int) -> dict[str, float]:
        figures = self._measure(daemon)[2:4]
        more = daemon.facts["more"][50:]
        with daemon.connect(substitute_urls=daemon.facts["server"].url) as client:
            figures.append(timed(lambda: client.substitutable(more)))
            assert len(client.substitutable(more)) == len(more)
        self._forget(daemon)
        return dict(zip(self.METRICS, figures, strict=True))
