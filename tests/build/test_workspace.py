"""The directories of builds, and who can get at them."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.build.leftovers import RUNNING
from guixd.build.users import BuildUser
from guixd.build.workspace import Workspace
from guixd.errors import StoreError
from guixd.formats.path import StoreDirectory
from tests.support import requires_root, temporary_directory

CLIENT = 61_000
BUILDER = BuildUser("builder", 61_001, 61_002, (61_002,))


def mode(path: str) -> int:
    """Return the permissions of PATH."""
    return stat.S_IMODE(os.lstat(path).st_mode)


class _Workspaces(SynchronousTestCase):
    user: BuildUser | None = None

    def setUp(self) -> None:
        self.directory = temporary_directory(self, world_readable=True)
        os.mkdir(self.directory + "/store")
        self.store = StoreDirectory(self.directory + "/store")
        self.drv = self.store.child("0" * 32 + "-x.drv")
        self.outside = self.directory + "/guix-build-x.drv-0"

    def create(self, use_chroot: bool = True, **files: bytes) -> Workspace:
        workspace = Workspace.create(
            self.drv,
            temporary=self.directory,
            use_chroot=use_chroot,
            user=self.user,
            files=files,
        )
        self.addCleanup(workspace.remove)
        return workspace


class WorkspaceTests(_Workspaces):
    def test_container(self) -> None:
        """X18: names and modes, and that all of it goes."""
        workspace = self.create(graph=b"text")
        self.assertEqual(workspace.outside, self.outside)
        self.assertEqual(workspace.build_directory, self.outside + "/top")
        self.assertEqual(workspace.chroot, self.drv + ".chroot")
        modes = [mode(name) for name in (workspace.outside, workspace.build_directory)]
        self.assertEqual(modes, [RUNNING, 0o700])
        self.assertEqual(mode(self.drv + ".chroot"), 0o750)
        own = (workspace.store, f"{workspace.chroot}/tmp")
        self.assertEqual([mode(str(name)) for name in own], [0o1775, 0o1777])
        self.assertEqual(mode(self.outside + "/top/graph"), 0o644)
        workspace.remove()
        workspace.remove()
        self.assertEqual(os.listdir(self.directory), ["store"])
        self.assertEqual(os.listdir(self.store.path), [])

    def test_plain(self) -> None:
        """X18: without a container the builder reaches its directory by name."""
        workspace = self.create(False, graph=b"text")
        self.assertEqual(workspace.build_directory, self.outside)
        self.assertIsNone(workspace.chroot)
        self.assertEqual(os.listdir(self.outside), ["graph"])

    def test_taken_names(self) -> None:
        """X33, CVE-2025-52991: a name that exists, of whatever kind, is never used."""
        os.mkdir(self.outside)
        os.symlink(self.store.path, self.outside[:-1] + "1")
        Path(self.outside[:-1] + "2").touch()
        self.assertEqual(self.create().outside, self.outside[:-1] + "3")
        self.assertEqual(os.listdir(self.outside), [])

    def test_all_names_taken(self) -> None:
        """X33: whoever makes directories with all the next names keeps no build from its own."""
        for number in range(1000):
            os.mkdir(f"{self.outside[:-1]}{number}")
        self.assertRegex(self.create().outside, re.escape(self.outside[:-1]) + "[0-9]{4,}$")

    def test_stale_chroot(self) -> None:
        """X18: what an earlier build left in the way is deleted."""
        os.makedirs(self.drv + ".chroot/store/old")
        store = self.create().store
        assert store is not None
        self.assertEqual(os.listdir(store), [])

    def test_failure(self) -> None:
        """X25: when not all can be made, nothing is left."""
        with self.assertRaises(OSError):
            Workspace.create(
                self.drv,
                temporary=self.directory,
                use_chroot=True,
                user=self.user,
                files={"no/such": b""},
            )
        self.assertEqual(os.listdir(self.directory), ["store"])

    def test_store_of_builder(self) -> None:
        """X32: it is the directory that was made for it, whatever has its name now."""
        workspace = self.create()
        assert workspace.store is not None
        os.rename(workspace.store, workspace.store + ".moved")
        os.symlink(self.store.path, workspace.store)
        descriptor = workspace.open_store(self.store.path)
        status = os.stat(workspace.store + ".moved")
        self.assertTrue(os.path.samestat(os.fstat(descriptor), status))
        os.close(descriptor)

    def test_keep(self) -> None:
        """X23: a client finds the tree where the outer directory was."""
        workspace = self.create()
        Path(workspace.build_directory + "/file").touch(0o666)
        kept = workspace.keep(os.geteuid() or CLIENT, os.getegid())
        self.assertEqual((kept.path, kept.problem), (self.outside, ""))
        self.assertEqual((os.listdir(kept.path), mode(kept.path)), (["file"], 0o755))
        self.assertEqual(os.listdir(self.store.path), [])
        workspace.remove()
        self.assertTrue(os.path.exists(kept.path + "/file"))

    def test_keep_with_names_taken(self) -> None:
        """X33: what anybody makes beside a tree does not keep its client from getting it."""
        workspace = self.create()
        for end in ".pivot", "-1", ".keep":
            Path(self.outside + end).mkdir()
            Path(self.outside + end, "x").touch()
        kept = workspace.keep(os.geteuid() or CLIENT, os.getegid())
        self.assertEqual((kept.path, kept.problem), (self.outside, ""))


@requires_root
class BuildUserTests(_Workspaces):
    user = BUILDER

    def test_owners(self) -> None:
        """X18: the build user has the build directory, its group the store."""
        workspace = self.create(graph=b"")
        owners = {
            name: (os.lstat(name).st_uid, os.lstat(name).st_gid)
            for name in (
                workspace.outside,
                workspace.build_directory,
                workspace.build_directory + "/graph",
                self.drv + ".chroot",
                f"{workspace.chroot}/tmp",
                str(workspace.store),
            )
        }
        self.assertEqual(
            list(owners.values()),
            [(0, 0), (61_001, 61_002), (0, 0), (0, 0), (0, 0), (0, 61_002)],
        )

    def test_exchanged(self) -> None:
        """CVE-2025-52993: what is put in place of a new directory is given to nobody."""
        victim = Path(self.directory, "victim")
        victim.mkdir(mode=0o700)
        victim.joinpath("f").touch()
        theirs = Path(self.directory, "theirs")
        make = os.mkdir

        def link(name: str) -> None:
            os.symlink(victim, name)

        def directory(name: str) -> None:
            make(theirs)
            os.chown(theirs, CLIENT, CLIENT)
            os.rename(theirs, name)

        for attack in link, directory:
            for use_chroot in True, False:

                def make_and_lose(name: str, mode: int = 0o777, **where: int) -> None:
                    make(name, mode, **where)
                    if name == self.outside:
                        os.rmdir(name)
                        attack(name)  # noqa: B023

                self.patch(os, "mkdir", make_and_lose)
                self.assertRaises((OSError, StoreError), self.create, use_chroot)
                self.patch(os, "mkdir", make)
                status = victim.stat()
                self.assertEqual((status.st_uid, stat.S_IMODE(status.st_mode)), (0, 0o700))
                self.assertEqual(os.listdir(victim), ["f"])
                self.assertFalse(os.path.lexists(self.outside))

    def fill(self, workspace: Workspace) -> str:
        """Make files of the build user; return the name of the tree."""
        tree = workspace.build_directory
        script = (
            f"cd {tree}; mkdir d; echo > d/f; chmod 6777 d/f; chmod 777 d .; ln -s /etc/shadow l"
        )
        os.chmod(workspace.outside, 0o711)  # So that the builder reaches it here.
        subprocess.run(["sh", "-c", script], user=61_001, group=61_002, check=True)
        os.chmod(workspace.outside, 0o700 if tree != workspace.outside else 0o777)
        return tree

    def test_keep_for_client(self) -> None:
        """X23, CVE-2021-27851: the client gets the tree, without dangerous modes."""
        for use_chroot in True, False:
            workspace = self.create(use_chroot)
            self.fill(workspace)
            kept = workspace.keep(CLIENT, 61_003)
            self.assertEqual((kept.path, kept.problem), (workspace.outside, ""))
            workspace.remove()
            self.assertEqual(os.listdir(self.store.path), [])
            names = ("", "/d", "/d/f", "/l")
            found = [os.lstat(kept.path + name) for name in names]
            self.assertEqual([s.st_uid for s in found], [CLIENT] * 4)
            self.assertEqual([s.st_gid for s in found], [61_003] * 4)
            self.assertEqual([mode(kept.path + name) for name in names[:3]], [0o755, 0o775, 0o775])
            self.assertEqual(os.stat("/etc/shadow").st_uid, 0)
            self.assertEqual(
                sorted(os.listdir(self.directory)), [os.path.basename(kept.path), "store"]
            )
            subprocess.run(["rm", "-r", kept.path], check=True)

    def test_keep_for_root(self) -> None:
        """X23: for root, or nobody known, the tree stays closed."""
        for uid in 0, None:
            workspace = self.create()
            self.fill(workspace)
            kept = workspace.keep(uid, None)
            self.assertEqual(mode(kept.path), 0o700)
            self.assertEqual(os.lstat(kept.path + "/top/d/f").st_uid, 61_001)
            subprocess.run(["rm", "-r", kept.path], check=True)

    def test_keep_refused(self) -> None:
        """X23, CVE-2021-27851: a file with a name elsewhere is given to nobody."""
        secret = self.directory + "/secret"
        Path(secret).touch()
        workspace = self.create()
        os.link(secret, workspace.build_directory + "/link")
        kept = workspace.keep(CLIENT, 61_003)
        self.assertNotEqual(kept.problem, "")
        self.assertEqual((os.stat(secret).st_uid, mode(kept.path)), (0, 0o700))
        subprocess.run(["rm", "-r", kept.path], check=True)

    def test_nobody_enters(self) -> None:
        """X33, CVE-2024-38531: whatever the builder permits, others do not reach the tree."""
        tree = self.fill(self.create())
        others = subprocess.run(
            ["stat", tree + "/d"], user=CLIENT, group=CLIENT, check=False, stderr=subprocess.DEVNULL
        )
        self.assertNotEqual(others.returncode, 0)
