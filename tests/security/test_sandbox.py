"""Builders that attack."""

from __future__ import annotations

import ctypes
import os
import socket
from dataclasses import replace
from pathlib import Path

from twisted.trial.unittest import TestCase

from guixd.build.leftovers import RUNNING
from guixd.sandbox import kernel, phases
from tests.sandbox.place import Place
from tests.support import (
    DirectoryTestCase,
    is_root,
    require,
    requires_root,
    requires_user_namespaces,
)


class _Attacks:
    mode = ""

    def setUp(self) -> None:
        assert isinstance(self, TestCase)
        self.place = Place(self, self.mode)

    async def refuse(self, builder: str) -> None:
        """Run BUILDER, which must not be run."""
        build = self.place.prepare(self.place.derivation("echo was run", builder=builder))
        arguments = ("busybox", "sh", "-c", "echo was run")
        seen = await self.place.finish(replace(build.spec, arguments=arguments))
        self.assertEqual(seen.code, 1, (builder, seen))
        self.assertNotIn("was run\n", seen.text)
        self.assertIn(builder, seen.text)

    async def test_program_outside(self) -> None:
        """X33, B31, CVE-2019-5736: a builder outside the store, whatever leads to it."""
        item = self.place.busybox
        os.symlink("/proc/self/exe", item + "/self")
        os.symlink("/bin/busybox", item + "/outside")
        os.symlink("../../../../../../bin/busybox", item + "/relative")
        os.symlink("loop", item + "/loop")
        store = self.place.store.path
        for builder in (
            "/proc/self/exe",
            "/bin/busybox",
            "/bin/sh",
            item + "/self",
            item + "/outside",
            item + "/relative",
            item + "/loop",
            item + "/missing",
            f"{item}/../../../../../../../../bin/busybox",
            store + "/..",
            "busybox",
            "",
        ):
            await self.refuse(builder)

    async def test_program_of_no_kind(self) -> None:
        """B31, B30: what cannot be executed is no shell script."""
        script = Path(self.place.busybox + "/script")
        script.write_text("echo was run\n")
        await self.refuse(str(script))
        script.chmod(0o755)
        await self.refuse(str(script))
        build = self.place.prepare(self.place.derivation("", builder=str(script)))
        seen = await self.place.finish(build.spec)
        self.assertEqual(seen.text, f"error: cannot run builder '{script}': Exec format error\n")
        build = self.place.prepare(
            self.place.derivation("", builder=str(script), platform="sparc-linux")
        )
        seen = await self.place.finish(build.spec)
        self.assertTrue(seen.text.startswith("@ unsupported-platform "), seen.text)
        self.assertEqual(seen.code, 1)

    async def test_keys_of_daemon(self) -> None:
        """X33: the keys in the daemon's session cannot be seen, let alone read."""
        require(is_root(), "root, as all users see the names of their own keys")
        kernel.join_new_session_keyring()
        name = f"guixd-test-{os.getpid()}".encode()
        number = {"x86_64": 248, "i686": 286}.get(os.uname().machine, 217)
        key = ctypes.CDLL(None).syscall(number, b"user", name, b"secret", 6, -3)
        require(key > 0, "a kernel with keyrings", of_kernel=True)
        self.assertIn(name, Path("/proc/keys").read_bytes())
        seen = await self.place.run("$b cat /proc/keys; echo end")
        self.assertEqual(seen.lines[-1], "end")
        self.assertNotIn(name.decode(), seen.text)

    async def test_environment_of_daemon(self) -> None:
        """X12: nothing of the daemon's variables or files comes through."""
        os.environ["GUIXD_TEST_SECRET"] = "secret"
        self.addCleanup(os.environ.pop, "GUIXD_TEST_SECRET")
        seen = await self.place.run("$b env; $b ls -l /proc/self/fd /proc/$$/fd")
        self.assertNotIn("SECRET", seen.text)
        self.assertNotIn("socket", seen.text)


class _ContainedAttacks(_Attacks):
    async def test_host_socket(self) -> None:
        """X30, CVE-2024-27297, CVE-2025-46416: no socket of the host, in builds of any kind."""
        name = f"guixd-test-{os.getpid()}"
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        listener.bind(f"\0{name}".encode())
        listener.listen()
        for fixed in True, False:
            seen = await self.place.run("$b cat /proc/net/unix; echo end", fixed=fixed)
            self.assertEqual(seen.lines[-1], "end")
            self.assertNotIn(name, seen.text)

    async def test_suicide(self) -> None:
        """X11: the first process cannot end itself by a signal; the build goes on."""
        seen = await self.place.run("$b kill -9 $$; echo alive")
        self.assertEqual((seen.lines, seen.code), (["alive"], 0))

    async def test_undeclared(self) -> None:
        """X6: an item that is no input is not there, nor is anything of the host."""
        secret = Path(self.place.item("secret"))
        secret.write_text("secret")
        seen = await self.place.run(
            f"$b cat {secret} /etc/shadow /proc/1/root/{secret}; $b ls /root /home /srv /sys /bin"
        )
        self.assertNotIn("secret\n", seen.text + "\n")
        self.assertEqual(seen.text.count("No such file"), 8, seen.text)


class ResolveTests(DirectoryTestCase):
    def test_other_file(self) -> None:
        """X33, CVE-2019-5736: the name that a link tells must be that of the very file."""
        name = self.at("f")
        with Path(name).open("w") as file:
            builder = f"/proc/self/fd/{file.fileno()}"
            self.assertEqual(phases._resolve(builder), name)
            os.unlink(name)
            Path(name + " (deleted)").touch()
            self.assertRaises(FileNotFoundError, phases._resolve, builder)


@requires_root
class BuildUserAttacks(_ContainedAttacks, TestCase):
    """By a build user."""

    mode = "users"

    async def test_setuid(self) -> None:
        """X33, CVE-2024-38531: a setuid program stays where nobody can reach it."""
        build = self.place.prepare(
            self.place.derivation("$b cp $b p; $b chmod 4755 p; $b chmod 777 .; $b stat -c %a p")
        )
        seen = await self.place.finish(build.spec)
        self.assertEqual(seen.lines, ["4755"])
        self.assertEqual(os.stat(build.workspace.outside).st_mode & 0o7777, RUNNING)


@requires_user_namespaces
class RootlessAttacks(_ContainedAttacks, TestCase):
    """By the daemon's own user."""

    mode = "rootless"

    async def test_exchanged_parent(self) -> None:
        """X32: a builder that puts a link above its outputs makes its build fail, no more."""
        directory, moved = self.place.directory, "/tmp/moved"
        target = Path(f"{directory}/target{self.place.store.path}")
        target.mkdir(parents=True)
        busybox = f"{moved}{self.place.busybox.removeprefix(directory)}/busybox"
        build = self.place.prepare(
            self.place.derivation(
                f"cd /; $b mv {directory} {moved};"
                f"{busybox} ln -s {directory}/target{directory} {directory};"
                f"{busybox} readlink {directory}"
            )
        )
        outcome = await self.place.finish(build.spec)
        self.assertEqual(outcome.lines, [f"{directory}/target{directory}"])
        descriptor = build.workspace.open_store(self.place.store.path)
        self.addCleanup(os.close, descriptor)
        self.assertEqual(os.listdir(descriptor), [self.place.busybox.base])
        build.workspace.remove()
        self.assertEqual(os.listdir(target), [])
        self.assertFalse(os.path.lexists(build.workspace.chroot or ""))

    async def test_daemon_files(self) -> None:
        """X31: the daemon's processes and files are out of reach, though the uid is the same."""
        seen = await self.place.run("cd /proc; echo [0-9]*; $b ls -A /")
        self.assertEqual(seen.lines[0], "1")


class PlainAttacks(_Attacks, TestCase):
    """Without a container."""

    mode = "plain"
