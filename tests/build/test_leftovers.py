"""What dead daemons leave in the directory for build trees."""

from __future__ import annotations

import os
import stat

from guixd.build.leftovers import RUNNING, remove_leftovers
from guixd.build.users import BuildUser
from guixd.build.workspace import Workspace
from guixd.errors import StoreError
from guixd.formats.path import StoreDirectory
from tests.support import DirectoryTestCase, is_root, last_descriptor, require


class LeftoverTests(DirectoryTestCase):
    def tree(self, name: str) -> Workspace:
        os.makedirs(self.at("store"), exist_ok=True)
        path = StoreDirectory(self.at("store")).child("0" * 32 + f"-{name}.drv")
        return Workspace.create(path, temporary=self.directory, use_chroot=True, user=None)

    def die(self, workspace: Workspace) -> str:
        """Leave WORKSPACE as a dead process does."""
        workspace._close()
        return workspace.outside

    def test_trees(self) -> None:
        """Trees of dead daemons go; those of running builds and kept ones stay."""
        dead, running = self.die(self.tree("dead")), self.tree("running")
        failed = self.tree("kept")
        kept = failed.keep(None, None).path
        self.assertEqual(stat.S_IMODE(os.stat(kept).st_mode), 0o700)
        self.assertEqual(remove_leftovers(self.directory), [])
        self.assertFalse(os.path.exists(dead))
        self.assertTrue(os.path.exists(running.outside) and os.path.exists(kept))
        running.remove()

    def test_downloads(self) -> None:
        """Those that the build users have go, too, if they are known."""
        require(is_root(), "root")
        path = StoreDirectory(self.at("store")).child("0" * 32 + "-git.drv")
        user = BuildUser("builder", 61_001, 61_002, ())
        for end in True, False:
            workspace = Workspace.create(
                path, temporary=self.directory, use_chroot=False, user=user, files={"f": b""}
            )
            tree = workspace.outside
            if end:
                self.die(workspace)
            for gid in None, 61_003:
                remove_leftovers(self.directory, gid)
                self.assertTrue(os.path.exists(tree))
            self.assertEqual(remove_leftovers(self.directory, 61_002), [])
            self.assertEqual(os.path.exists(tree), not end)
            workspace.remove()

    def test_others(self) -> None:
        """What only looks like one is left alone."""
        outside = self.at("outside")
        os.mkdir(outside)
        os.chmod(outside, RUNNING)
        os.mkdir(outside + "/top")
        os.symlink(outside, self.at("guix-build-a.drv-0"))
        os.mkdir(self.at("guix-build-b.drv-0"))
        os.mkdir(self.at("guix-build-b.drv-0/top"))
        os.mkdir(self.at("guix-build-new.drv-0"))
        os.chmod(self.at("guix-build-new.drv-0"), RUNNING)
        os.mkdir(self.at("guix-build-c"))
        before = sorted(os.listdir(self.directory))
        self.assertEqual(remove_leftovers(self.directory), [])
        self.assertEqual(sorted(os.listdir(self.directory)), before)
        self.assertEqual(os.listdir(outside), ["top"])

    def test_empty(self) -> None:
        """Trees that were not even filled go when they are old."""
        tree = self.at("guix-build-a.drv-0")
        os.mkdir(tree)
        os.chmod(tree, RUNNING)
        remove_leftovers(self.directory)
        self.assertTrue(os.path.exists(tree))
        os.utime(tree, (1, 1))
        remove_leftovers(self.directory)
        self.assertFalse(os.path.exists(tree))

    def test_no_descriptors(self) -> None:
        """X25: what could neither be used nor removed, as too much was open, goes later."""
        tree = self.at("guix-build-a.drv-0")
        os.mkdir(self.at("store"))
        with self.assertRaises(StoreError), last_descriptor(free=False):
            self.tree("a")
        os.utime(tree, (1, 1))
        self.assertEqual(remove_leftovers(self.directory), [])
        self.assertFalse(os.path.exists(tree))

    def test_foreign(self) -> None:
        """A user's directory is his own."""
        require(is_root(), "root")
        tree = self.die(self.tree("a"))
        os.chown(tree, 61998, -1)
        os.chmod(tree, RUNNING)
        remove_leftovers(self.directory)
        self.assertTrue(os.path.exists(tree + "/top"))

    def test_nowhere(self) -> None:
        """A directory that is not there is told of."""
        (problem,) = remove_leftovers(self.at("nowhere"))
        self.assertIn("nowhere", problem)
