"""Downloads through the whole daemon: what their tests share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

from guixd.build import download
from guixd.build.request import BuildMode
from guixd.client import Client, RequestFailed
from guixd.formats import derivation
from guixd.formats.derivation import Derivation, HashCache, Output
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from guixd.service.builder import SandboxBuilder
from guixd.settings import this_system
from guixd.testing import TemporaryDaemon
from tests.net.servers import unused_port
from tests.service.world import DaemonCase

CONTENT = b"what is wanted\n"


def quoted(*texts: str) -> str:
    """Return TEXTS as Scheme prints a list of strings."""
    return "(" + " ".join(f'"{text}"' for text in texts) + ")"


class DownloadCase(DaemonCase):
    """A daemon without build users, which downloads need not have."""

    environ: dict[str, str] = {}
    base = ""
    """The server of repositories."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(download, "ARCHIVE", f"http://127.0.0.1:{unused_port()}/")

    def make(self, **options: Any) -> TemporaryDaemon:
        return super().make(**{**options, "builder": SandboxBuilder, "environ": self.environ})

    async def derive(
        self,
        client: Client,
        url: str,
        *,
        content: bytes = CONTENT,
        name: str = "file",
        builder: str = "builtin:download",
        executable: bool = False,
        archive: bytes | None = None,
        fixed: bool = True,
        sources: Iterable[StorePath] = (),
        **variables: str,
    ) -> tuple[StorePath, StorePath]:
        """Add a derivation that downloads CONTENT; return it and its output.

        :param url: as it stands in the derivation.
        :param archive: what the NAR is to be, in place of CONTENT.
        :param variables: of its environment, with `_` in place of `-`.
        """
        environment = {key.replace("_", "-"): value for key, value in variables.items()}
        if url:
            environment["url"] = url
        if executable:
            environment["executable"] = "1"
        data = nar_of_file(content, True) if executable else content
        recursive = executable or archive is not None
        algorithm = "r:sha256" if recursive else "sha256"
        data = data if archive is None else archive
        digest = hashlib.sha256(data).hexdigest()
        none = self.store.child("0" * 32 + "-none")
        output = Output(none, algorithm, digest) if fixed else Output(none)
        sources = tuple(sorted(sources))
        environment["preferLocalBuild"] = "1"
        drv = Derivation({"out": output}, {}, sources, this_system(), builder, (), environment)
        cache = HashCache(self.unknown, {})
        out = derivation.compute_output_paths(drv, name, self.store, cache)["out"]
        environment = {**environment, "out": out}
        output = Output(out, output.algorithm, output.hash)
        drv = Derivation({"out": output}, {}, sources, this_system(), builder, (), environment)
        path = await client.add_text(f"{name}.drv", derivation.serialise(drv), list(sources))
        return path, out

    async def derive_git(
        self,
        client: Client,
        archive: bytes,
        repository: str = "one",
        *,
        name: str = "checkout",
        url: str = "",
        **variables: str,
    ) -> tuple[StorePath, StorePath]:
        """Add a derivation that checks out what has the NAR ARCHIVE."""
        url = url or f"{self.base}/{repository}/.git"
        builder = "builtin:git-download"
        return await self.derive(
            client, f'"{url}"', name=name, archive=archive, builder=builder, **variables
        )

    def unknown(self, path: StorePath) -> Derivation:
        raise AssertionError(path)

    async def failure(
        self, client: Client, drv: StorePath, mode: BuildMode = BuildMode.NORMAL
    ) -> tuple[int, str]:
        """Build DRV, which fails; return the status and the whole log."""
        self.log.clear()
        try:
            await client.build_paths([drv], mode)
        except RequestFailed as error:
            log = b"".join(self.log).decode()
            self.assertEqual(os.listdir(self.directory + "/tmp"), [])
            self.assertEqual([n for n in os.listdir(self.store.path) if "chroot" in n], [])
            return error.status, log + error.text
        raise AssertionError("did not fail")
