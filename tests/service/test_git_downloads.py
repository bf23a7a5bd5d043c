"""`builtin:git-download` through the whole daemon (W19)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from twisted.internet import reactor
from twisted.web.server import Site
from twisted.web.static import File

from guixd.build import heritage, narfallback
from guixd.client import nar_of_tree
from guixd.settings import UidRange
from guixd.testing import TemporaryDaemon
from tests.net.servers import Asked, Server, answer, unused_port
from tests.net.test_codecs import lzip
from tests.service.downloads import DownloadCase
from tests.support import require

FIRST_UID = 3_000_000 + 16 * os.getpid()
_IDENTITY = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main")


class GitCase(DownloadCase):
    """A repository behind a server that knows nothing of Git, so that parts cannot be had."""

    if os.geteuid() == 0:
        options = {"build_uids": UidRange(FIRST_UID, 2, 64001)}

    def setUp(self) -> None:
        require(shutil.which("git") is not None, "git")
        super().setUp()
        self.patch(narfallback, "SERVERS", ())
        self.patch(heritage, "HOST", f"http://127.0.0.1:{unused_port()}")
        self.top = Path(self.directory, "repositories")
        self.top.mkdir()
        port = reactor.listenTCP(0, Site(File(str(self.top))), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        self.base = f"http://127.0.0.1:{port.getHost().port}"

    def git(self, *arguments: str, where: str) -> str:
        environment = {**os.environ, "HOME": str(self.top), "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", *_IDENTITY, "-c", "protocol.file.allow=always", *arguments]
        return subprocess.run(
            command, cwd=where, env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    def repository(self, name: str) -> str:
        """Make a repository with a program, a link and a tag; return its first commit."""
        tree = str(self.top / name)
        os.mkdir(tree)
        self.git("init", "--quiet", where=tree)
        Path(tree, "program").write_text("#!/bin/sh\n")
        os.chmod(tree + "/program", 0o755)
        Path(tree, "text").write_text("first\n")
        os.symlink("text", tree + "/link")
        self.commit(tree)
        self.git("tag", "v1", where=tree)
        first = self.git("rev-parse", "HEAD", where=tree)
        Path(tree, "text").write_text("second\n")
        self.commit(tree)
        return first

    def commit(self, tree: str) -> None:
        self.git("add", ".", where=tree)
        self.git("commit", "--quiet", "-m", "x", where=tree)
        self.git("update-server-info", where=tree)

    def wanted(self, name: str, commit: str, inner: str = "") -> bytes:
        """Return the NAR of COMMIT of the repository NAME, with submodules."""
        tree = str(self.top / "wanted")
        self.git("clone", "--quiet", name, tree, where=str(self.top))
        self.git("checkout", "--quiet", commit, where=tree)
        if inner:
            shutil.copytree(self.top / inner, tree + "/inner", symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(tree + "/inner/.git")
        shutil.rmtree(tree + "/.git")
        data = b"".join(nar_of_tree(tree))
        shutil.rmtree(tree)
        return data


class GitTest(GitCase):
    async def test_commits_and_tags(self) -> None:
        """W19: modes and links are kept, there is no `.git`; what cannot be had in part."""
        first = self.repository("one")
        client = await self.client()
        archive = self.wanted("one", first)
        for name, commit in (("a", first), ("b", "v1")):
            drv, out = await self.derive_git(client, archive, name=name, commit=commit)
            await client.build_paths([drv])
            self.assertEqual(sorted(os.listdir(out)), ["link", "program", "text"])
            self.assertEqual(os.stat(out + "/program").st_mode & 0o777, 0o555)
            self.assertEqual(Path(out, "text").read_text(), "first\n")
            self.assertEqual(os.readlink(out + "/link"), "text")

    async def test_submodules(self) -> None:
        """W19: they are fetched; one that is a local file is refused."""
        self.repository("inner")
        self.repository("outer")
        tree = str(self.top / "outer")
        self.git("submodule", "--quiet", "add", f"{self.top}/inner/.git", "inner", where=tree)
        client = await self.client()
        modules = Path(tree, ".gitmodules")
        local = modules.read_text()
        for url in (f"{self.base}/inner/.git", f"file://{self.top}/inner/.git"):
            modules.write_text(local.replace(f"{self.top}/inner/.git", url))
            self.commit(tree)
            commit = self.git("rev-parse", "HEAD", where=tree)
            archive = self.wanted("outer", commit, "inner")
            variables = {"commit": commit, "recursive?": "#t"}
            drv, out = await self.derive_git(client, archive, "outer", **variables)
            if url.startswith("http"):
                await client.build_paths([drv])
                self.assertEqual(Path(out, "inner/text").read_text(), "second\n")
                self.assertEqual(list(Path(out).rglob(".git")), [])
            else:
                status, text = await self.failure(client, drv)
                self.assertEqual(status, 1)
                self.assertIn("transport 'file' not allowed", text)
                self.assertFalse(os.path.exists(out))

    async def test_archives_elsewhere(self) -> None:
        """W20: with lzip, plain, wrong and hostile ones; not if that is not wanted."""
        first = self.repository("one")
        good = self.wanted("one", first)
        bodies: dict[str, bytes] = {}

        def script(connection: Asked, request: str) -> None:
            path = request.split()[1].rpartition("/")[0]
            body = bodies.get(path)
            connection.send(answer(status="404 No") if body is None else answer(body))

        server = Server(self, script)
        self.patch(narfallback, "SERVERS", (server.url("/a"), server.url("/b")))
        client = await self.client()
        traversal = good.replace(b"text", b"..", 1)
        for number, chosen in enumerate(
            (
                {"/a/nar/lzip": lzip(good)},
                {"/b/nar": good},
                {"/a/nar/lzip": lzip(good.replace(b"first", b"other")), "/b/nar/lzip": lzip(good)},
                {"/a/nar/lzip": b"nonsense", "/b/nar/lzip": lzip(traversal), "/a/nar": good},
            )
        ):
            bodies = chosen
            drv, out = await self.derive_git(client, good, "none", name=f"n{number}", commit="v1")
            await client.build_paths([drv])
            self.assertEqual(Path(out, "text").read_text(), "first\n")
        bodies = {"/a/nar": good[:-8], "/b/nar": good.replace(b"first", b"other")}
        drv, out = await self.derive_git(client, good, "none", name="w", commit="v1")
        status, text = await self.failure(client, drv)
        self.assertEqual(status, 1)
        self.assertIn("hash mismatch", text)
        self.assertFalse(os.path.exists(out))
        self.patch(narfallback, "_KEPT_FREE", 1 << 60)
        drv, out = await self.derive_git(client, good, "none", name="k", commit="v1")
        status, text = await self.failure(client, drv)
        self.assertIn("more than 0 bytes came", text)
        self.patch(narfallback, "SERVERS", (f"http://127.0.0.1:{unused_port()}",))
        drv, out = await self.derive_git(client, good, "none", name="r", commit="v1")
        status, text = await self.failure(client, drv)
        self.assertEqual(text.count("trying http://127.0.0.1:"), 1)
        before = len(server.requests)
        drv, _ = await self.derive_git(
            client, good, "none", name="u", commit="v1", download_methods="(upstream)"
        )
        self.assertEqual((await self.failure(client, drv))[0], 1)
        self.assertEqual(len(server.requests), before)

    async def test_what_git_can_see(self) -> None:
        """W19, W22: nothing of the machine but programs, and nobody's processes."""
        canary = Path(self.directory, "canary")
        canary.write_text("secret")
        program = self.top / "programs/bin/git"
        program.parent.mkdir(parents=True)
        program.write_text(
            f"""#!/bin/sh
            if [ "$1" = init ]; then
              echo "canary: $(cat {canary} {self.store.path}/* 2>&1)"
              echo "root: $(echo /*)" "home: $HOME" "secret: $SECRET"
              echo "processes: $(echo /proc/[0-9]*)"
              echo "proxy: $http_proxy $https_proxy $no_proxy"
              echo "arguments: $(tr '\\0\\n' '  ' </proc/1/cmdline)"
              touch /usr/x /etc/x /x && echo writes
              kill -0 {os.getpid()} && echo signals
            fi
            exit 1
            """
        )
        program.chmod(0o755)
        drv, _ = await self.derive_git(await self.client(), b"x", commit="v1")
        secrets = {"SECRET": "x", "HTTP_PROXY": "http://me:hidden@p", "ALL_PROXY": "q:1"}
        self.patch(os, "environ", {**os.environ, "PATH": str(program.parent), **secrets})
        self.daemon = await self.again()
        status, text = await self.failure(await self.client(), drv)
        self.assertEqual(status, 1)
        self.assertIn("canary: ", text)
        self.assertNotIn("secret\n", text)
        shown = text.partition("root: ")[2].split(" home: ")[0].split()
        usual = "bin dev etc gnu lib lib32 lib64 nix proc run sbin tmp usr checkout"
        self.assertLess(set(shown), {f"/{name}" for name in usual.split(" ")})
        self.assertIn("home: /checkout/home secret: \n", text)
        self.assertEqual(len(text.partition("processes: ")[2].splitlines()[0].split()), 3)
        self.assertIn("proxy: http://me:hidden@p q:1 \n", text)
        arguments = text.partition("arguments: ")[2].splitlines()[0]
        self.assertIn("python3", arguments)
        self.assertNotIn("hidden", arguments)  # Anybody can see those.
        self.assertNotIn("writes", text)
        self.assertNotIn("signals", text)

    async def again(self) -> TemporaryDaemon:
        """Start another daemon in place of the first."""
        await self.daemon.stop()
        daemon = self.make(**self.options)
        daemon.start()
        self.addCleanup(daemon.stop)
        return daemon

    async def test_what_is_refused(self) -> None:
        """W6, W19: options in place of commits, local repositories, nothing at all."""
        self.repository("one")
        client = await self.client()
        for url, commit in (
            (f"{self.base}/one/.git", "-x"),
            (f"{self.base}/one/.git", "--upload-pack=id"),
            (f"{self.base}/one/.git", ""),
            (f"{self.base}/one/.git", "nothing"),
            (f"file://{self.top}/one", "v1"),
            (f"{self.top}/one", "v1"),
            ("ext::id", "v1"),
            ("--upload-pack=id", "v1"),
            (f"{self.base}/none/.git", "v1"),
        ):
            drv, out = await self.derive_git(client, b"x", url=url, commit=commit)
            status, _ = await self.failure(client, drv)
            self.assertEqual(status, 1, url)
            self.assertFalse(os.path.exists(out))
