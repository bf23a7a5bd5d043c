"""Builds through the whole daemon: sockets, options, containers, logs."""

from __future__ import annotations

import bz2
import gzip
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet.defer import fail

from guixd.build.engine import Engine
from guixd.client import Client, RequestFailed
from guixd.errors import SandboxError
from guixd.formats import derivation
from guixd.formats import operations as op
from guixd.formats.derivation import Derivation, HashCache, Output
from guixd.formats.nar import nar_of_file
from guixd.formats.path import StorePath
from guixd.service.builder import SandboxBuilder
from guixd.service.shared import Daemon
from guixd.settings import UidRange, this_system
from guixd.store.derivations import Derivations
from guixd.store.local import LocalStore
from guixd.testing import FakeLauncher, FakeProcess, TemporaryDaemon
from tests.service.world import DaemonCase, set_options
from tests.support import require, requires_root

BUSYBOX = "/bin/busybox"
FIRST_UID = 2_000_000 + 16 * os.getpid()


class RealCase(DaemonCase):
    def make(self, **options: Any) -> TemporaryDaemon:
        return super().make(**{**options, "builder": self.make_builder})

    def make_builder(self, daemon: Daemon, store: LocalStore) -> object:
        return SandboxBuilder(daemon, store)

    async def tools(self, client: Client) -> StorePath:
        """Add a directory with a static shell."""
        require(os.path.exists(BUSYBOX), "busybox-static")
        directory = Path(self.directory, "tools")
        if not directory.exists():
            directory.mkdir()
            shutil.copy(BUSYBOX, directory / "busybox")
        return await client.add_tree("tools", str(directory))

    async def derive(
        self, client: Client, name: str, script: str, **fields: Any
    ) -> tuple[StorePath, StorePath]:
        """Add a derivation that runs SCRIPT; return it and its output.

        :param fields: of the derivation, in place of the usual ones; its environment
            is added to.
        """
        tools = await self.tools(client)
        none = self.store.child("0" * 32 + "-none")
        variables = {"name": name, **fields.pop("environment", {})}
        drv = Derivation(
            outputs={"out": Output(none, "", "")},
            inputs={},
            sources=(tools,),
            platform=this_system(),
            builder=f"{tools}/busybox",
            arguments=("sh", "-e", "-c", script),
            environment=variables,
        )
        drv = replace(drv, **fields)
        out = derivation.compute_output_paths(drv, name, self.store, HashCache(self.unknown, {}))
        drv = replace(
            drv,
            outputs={"out": Output(out["out"], "", "")},
            environment={**variables, **out},
        )
        path = await client.add_text(f"{name}.drv", derivation.serialise(drv), [tools])
        return path, out["out"]

    def unknown(self, path: StorePath) -> Derivation:
        raise AssertionError(path)


@requires_root
class ContainerTests(RealCase):
    options = {"build_uids": UidRange(FIRST_UID, 2, 64001), "cores": 42, "max_jobs": 2}

    async def test_cores(self) -> None:
        """O15: builders find the daemon's number of cores, or the client's."""
        client = await self.client()
        drv, out = await self.derive(client, "a", "echo $NIX_BUILD_CORES > $out")
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_text(), "42\n")
        await client.set_options(set_options(("build-cores", "3")))
        drv, out = await self.derive(client, "b", "echo $NIX_BUILD_CORES > $out")
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_text(), "3\n")

    async def test_leaving(self) -> None:
        """P27: the builder of a client that leaves dies, and the next build works."""
        client = await self.client()
        drv, out = await self.derive(client, "l", "echo pid; while :; do :; done")
        raw = await self.raw(None, set_options(), op.BuildPaths((drv,)))
        await raw.received(b"build-started")
        pid = int(raw.data.partition(b".drv.gz ")[2].split(b"\n")[0])
        self.assertTrue(os.path.exists(f"/proc/{pid}"))
        raw.transport.loseConnection()
        await raw.closed
        await self.daemon.stop()
        self.assertFalse(os.path.exists(f"/proc/{pid}"))
        self.assertEqual(os.listdir(self.directory + "/tmp"), [])
        self.assertFalse(os.path.exists(out))


class PlayedCase(RealCase):
    """The builder is played by the test.

    :cvar made: what it makes.
    """

    made = "made\n"

    def make(self, **options: Any) -> TemporaryDaemon:
        users = UidRange(FIRST_UID, 2, 64001) if os.geteuid() == 0 else None
        return super().make(use_chroot=False, build_uids=users, **options)

    def make_builder(self, daemon: Daemon, store: LocalStore) -> object:
        def run(process: FakeProcess) -> None:
            process.write_log(b"hello\n")
            out = Path(dict(process.spec.environment)["out"])
            out.write_text(self.made)
            out.chmod(0o644)
            if process.spec.ids is not None:
                os.chown(out, process.spec.ids.uid, process.spec.ids.gid)
            process.exit()

        launcher = FakeLauncher(daemon.reactor, run)
        return Engine(daemon.reactor, daemon.settings, store, launcher, daemon.threads)

    async def build(self) -> StorePath:
        client = await self.client()
        await client.set_options(set_options())
        drv, out = await self.derive(client, "x", "true")
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_text(), self.made)
        return drv


class WantedTests(PlayedCase):
    async def test_nothing_to_do(self) -> None:
        """P16, P32, B1, B5: unknown outputs, absent paths and short names; what is valid."""
        client = await self.client()
        await client.set_options(set_options())
        drv, out = await self.derive(client, "x", "true")
        await client.build_paths([f"{drv}!nosuch"])
        absent = self.path("absent")
        await client.build_paths([absent])
        for path in out, absent:
            self.assertFalse(await client.is_valid_path(path))
        for short in "x.drv", "x", "0" * 32, ".links":
            text = await self.fails(client.build_paths([f"{self.store.path}/{short}"]))
            self.assertIn("not in the store", text)
        missing = self.path("absent.drv")
        self.assertIn(missing, await self.fails(client.build_paths([missing])))
        await client.build_paths([f"{drv}!out,nosuch"])
        self.assertTrue(await client.is_valid_path(out))
        self.log.clear()
        await client.build_paths([drv, f"{drv}!out", out])
        self.assertEqual(self.log, [])


class NoLogTests(PlayedCase):
    options = {"keep_log": False}

    async def test_no_log(self) -> None:
        """O17: with --lose-logs there is no file and an empty field in the trace."""
        drv = await self.build()
        started = f"@ build-started {drv} - {this_system()}  ".encode()
        self.assertIn(started, b"".join(self.log))
        self.assertFalse(os.path.exists(self.directory + "/log/drvs"))


class LogTests(PlayedCase):
    options = {"log_compression": "none"}
    suffix = ""
    opened: Any = open

    async def test_readable(self) -> None:
        """O18: the log can be read, and has the right name."""
        drv = await self.build()
        name = f"{self.directory}/log/drvs/{drv.base[:2]}/{drv.base[2:]}{self.suffix}"
        with type(self).opened(name, "rb") as file:
            self.assertEqual(file.read(), b"hello\n")


class GzipTests(LogTests):
    options = {"log_compression": "gzip"}
    suffix = ".gz"
    opened = gzip.open


class Bzip2Tests(LogTests):
    options = {"log_compression": "bzip2"}
    suffix = ".bz2"
    opened = bz2.open


class NoJobsTests(PlayedCase):
    options = {"max_jobs": 0}

    async def test_refused(self) -> None:
        """O22: without jobs ordinary builds are refused."""
        client = await self.client()
        drv, _ = await self.derive(client, "x", "true")
        error = await self.assertFailure(client.build_paths([drv]), RequestFailed)
        self.assertRegex(error.text, "unable to start any build.*`--max-jobs=1'")


class SystemTests(PlayedCase):
    options = {"max_jobs": 0, "system": "i686-linux"}

    async def test_local(self) -> None:
        """O23, D21: `--system` says what is local; only that is built without jobs."""
        client = await self.client()
        local = {"preferLocalBuild": "1"}
        drv, out = await self.derive(client, "x", "", platform="i686-linux", environment=local)
        await client.build_paths([drv])
        self.assertTrue(await client.is_valid_path(out))
        for platform, variables in (
            ("x86_64-linux", local),
            ("i686-linux", {}),
            ("i686-linux", {"preferLocalBuild": "yes"}),
        ):
            drv, _ = await self.derive(client, "y", "", platform=platform, environment=variables)
            error = await self.assertFailure(client.build_paths([drv]), RequestFailed)
            self.assertIn("unable to start any build", error.text)


class LinksTests(PlayedCase):
    made = "x" * 10000

    async def test_deduplication(self) -> None:
        """S17: what is added as a text or an archive, and what is built, is one file."""
        client = await self.client()
        text = await client.add_text("x", b"x" * 10000)
        archive = await client.add_nar("y", [nar_of_file(b"x" * 10000)])
        flat = await client.add_nar("z", [nar_of_file(b"x" * 10000)], recursive=False)
        drv = await self.build()
        (out,) = await client.derivation_outputs(drv)
        for path in text, archive, flat, out:
            self.assertEqual(os.stat(path).st_nlink, 5)
            self.assertEqual(os.stat(path).st_ino, os.stat(text).st_ino)

    async def test_setting(self) -> None:
        """O19: a client that is trusted may turn it off."""
        client = await self.client()
        await client.set_options(set_options(("auto-optimise-store", "false")))
        await client.add_text("x", b"x" * 10000)
        await client.add_nar("y", [nar_of_file(b"x" * 10000)])
        drv, _ = await self.derive(client, "z", "true")
        await client.build_paths([drv])
        self.assertEqual(os.listdir(self.store.path + "/.links"), [])


class NoLinksTests(PlayedCase):
    options = {"deduplicate": False}
    made = "x" * 10000

    async def test_no_deduplication(self) -> None:
        """O19: nothing is put into the pool of links."""
        client = await self.client()
        await client.add_text("x", b"x" * 10000)
        await client.add_nar("y", [nar_of_file(b"x" * 10000)])
        await self.build()
        self.assertEqual(os.listdir(self.store.path + "/.links"), [])


class RoundsTests(PlayedCase):
    options = {"rounds": 2}

    async def test_default(self) -> None:
        """O24, B14: `--rounds` counts for clients that do not say how many they want."""
        await self.build()
        self.assertEqual(b"".join(self.log).count(b"@ build-started"), 2)
        client = await self.client()
        await client.set_options(set_options(("build-repeat", "0")))
        drv, _ = await self.derive(client, "y", "true")
        await client.build_paths([drv])
        self.assertEqual(b"".join(self.log).count(b"@ build-started"), 1)


class LargeTests(PlayedCase):
    async def test_large_derivation(self) -> None:
        """S34: a derivation that is too large for the memory is not read by the reactor."""
        client = await self.client()
        drv, out = await self.derive(client, "x", "true #" + "x" * (5 << 20))
        readers: list[threading.Thread] = []
        load = Derivations._load

        def note(self: Derivations, path: StorePath) -> Derivation:
            readers.append(threading.current_thread())
            return load(self, path)

        self.patch(Derivations, "_load", note)
        await client.build_paths([drv])
        self.assertEqual(Path(out).read_text(), "made\n")
        self.assertGreater(len(readers), 0)
        self.assertNotIn(threading.main_thread(), readers)


@requires_root
class LostZygoteTests(PlayedCase):
    def make_builder(self, daemon: Daemon, store: LocalStore) -> object:
        engine: Any = super().make_builder(daemon, store)
        error = SandboxError("zygote", "the process that runs builders has died")
        self.patch(engine._workshop.launcher, "kill_user", lambda uid: fail(error))
        return engine

    async def test_kill_fails(self) -> None:
        """X22, X25: when nobody can kill what its user runs, a build leaves nothing behind."""
        client = await self.client()
        drv, out = await self.derive(client, "x", "true")
        error = await self.assertFailure(client.build_paths([drv]), RequestFailed)
        self.assertEqual((error.status, "has died" in error.text), (1, True), error.text)
        self.assertFalse(os.path.exists(out))
        self.assertEqual(os.listdir(self.directory + "/tmp"), [])
        self.assertEqual([n for n in os.listdir(self.store.path) if n.endswith(".chroot")], [])
