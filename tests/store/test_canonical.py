"""Metadata of what builds leave behind."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from guixd.errors import BuildError, StoreError
from guixd.store import canonical
from guixd.store.descent import Descent, walk
from guixd.store.trees import (
    InodesSeen,
    canonicalise,
    check_output,
    chown_tree,
    copy_fresh,
    hash_and_scan,
    strip,
)
from tests.archives import File, Link, Tree, read_tree, write_tree
from tests.support import DirectoryTestCase, is_root, require, requires_root

BUILDER = 61234
"""A uid of nobody else's."""


class TreeTestCase(DirectoryTestCase):
    def make(self, name: str, tree: Tree, owner: int | None = None) -> None:
        write_tree(os.fsencode(self.at(name)), tree)
        if owner is not None:
            chown_tree(self.fd, name, owner, owner)

    def mode(self, name: str) -> int:
        return stat.S_IMODE(os.lstat(self.at(name)).st_mode)

    def set_access_lists(self, file: str, directory: str) -> None:
        """Permit another user to write to FILE, and to what will be made in DIRECTORY."""
        text = (
            "02000000 01000700ffffffff 02000600 32ef0000 04000500ffffffff"
            "10000700ffffffff 20000500ffffffff"
        )
        try:
            os.setxattr(self.at(file), "system.posix_acl_access", bytes.fromhex(text))
            os.setxattr(self.at(directory), "system.posix_acl_default", bytes.fromhex(text))
        except OSError:
            require(False, "a file system with access control lists")


class CanonicaliseTests(TreeTestCase):
    def test_modes_and_times(self) -> None:
        """S6 B21: odd modes and times become those of the store, whatever the kind of file."""
        modes = {
            "setuid": (0o4755, 0o555),
            "setgid": (0o2644, 0o444),
            "sticky": (0o1555, 0o555),
            "private": (0o600, 0o444),
            "program": (0o700, 0o555),
            "none": (0o000, 0o444),
            "group": (0o654, 0o444),
            "plain": (0o444, 0o444),
            "done": (0o555, 0o555),
            "open": (0o777, 0o555),
        }
        self.make("t", {name.encode(): File(b"x") for name in modes})
        os.mkdir(self.at("t/d700"), 0o700)
        os.mkdir(self.at("t/d4777"))
        os.chmod(self.at("t/d4777"), 0o7777)
        os.symlink("nowhere", self.at("t/link"))
        for name, (mode, _) in modes.items():
            os.chmod(self.at(f"t/{name}"), mode)
        os.utime(self.at("t/plain"), ns=(5, 1_000_000_007))
        os.utime(self.at("t/done"), ns=(5, 1_000_000_000))
        canonicalise(self.fd, "t", None, set())
        for name, (_, expected) in modes.items():
            self.assertEqual(self.mode(f"t/{name}"), expected, name)
        for name in ("t", "t/d700", "t/d4777"):
            self.assertEqual(self.mode(name), 0o555)
        for name in ["t", *(f"t/{name}" for name in os.listdir(self.at("t")))]:
            status = os.lstat(self.at(name))
            self.assertEqual(status.st_mtime_ns, 1_000_000_000, name)
            self.assertEqual((status.st_uid, status.st_gid), (os.geteuid(), os.getegid()))
        self.assertEqual(os.lstat(self.at("t/plain")).st_atime_ns, 5)

    def test_directory_without_execute(self) -> None:
        """S6: what lies in a directory that cannot be entered is treated all the same."""
        self.make("t", {b"d": {b"f": File(b"x", True)}})
        os.chmod(self.at("t/d"), 0o600)
        canonicalise(self.fd, "t", None, set())
        self.assertEqual(self.mode("t/d"), 0o444)
        os.chmod(self.at("t/d"), 0o755)
        self.assertEqual(self.mode("t/d/f"), 0o555)
        self.assertEqual(os.lstat(self.at("t/d/f")).st_mtime_ns, 1_000_000_000)

    def test_hard_links_survive(self) -> None:
        """S6 B21: hard links within an output stay hard links."""
        self.make("t", {b"a": File(b"x")})
        os.link(self.at("t/a"), self.at("t/b"))
        seen: InodesSeen = set()
        canonicalise(self.fd, "t", os.geteuid(), seen)
        self.assertEqual(os.lstat(self.at("t/a")).st_ino, os.lstat(self.at("t/b")).st_ino)
        self.assertEqual(len(seen), 1)

    def test_special_files(self) -> None:
        """S6 B20: pipes and sockets are refused by name."""
        self.make("t", {b"d": {}})
        os.mkfifo(self.at("t/d/pipe"))
        with self.assertRaises(StoreError) as caught:
            canonicalise(self.fd, "t", None, set())
        self.assertIn("'t/d/pipe' has an unsupported type: it is a FIFO", caught.exception.text)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.at("s"))
        self.assertRaises(StoreError, canonicalise, self.fd, "s", None, set())

    def test_links_are_not_followed(self) -> None:
        """I-PATH: what symbolic links lead to is left alone."""
        self.make("outside", {b"f": File(b"x")})
        os.chmod(self.at("outside/f"), 0o640)
        self.make("t", {b"f": Link(b"../outside/f"), b"d": Link(b"../outside")})
        os.symlink("outside", self.at("top"))
        for name in ("t", "top"):
            canonicalise(self.fd, name, None, set())
        self.assertEqual(self.mode("outside/f"), 0o640)
        self.assertEqual(self.mode("outside"), 0o755)

    def test_extended_attributes(self) -> None:
        """B21: extended attributes of files and directories are dropped."""
        self.make("t", {b"f": File(b"x")})
        for name in ("t", "t/f"):
            try:
                os.setxattr(self.at(name), "user.note", b"x")
            except OSError:
                require(False, "a file system with extended attributes")
        os.chmod(self.at("t/f"), 0o444)
        canonicalise(self.fd, "t", None, set())
        for name in ("t", "t/f"):
            self.assertEqual(os.listxattr(self.at(name)), [])

    def test_exchanged(self) -> None:
        """I-PATH: what has taken the place of a file that was looked at is left alone."""
        self.make("t", {b"f": File(b"x")})
        self.make("other", File(b"y"))
        os.chmod(self.at("other"), 0o640)
        known = os.stat
        number = len(os.listdir("/proc/self/fd"))

        def looked_at(*arguments: Any, **more: Any) -> os.stat_result:
            status = known(*arguments, **more)
            if arguments[0] == "f" and os.path.exists(self.at("other")):
                os.rename(self.at("other"), self.at("t/f"))
            return status

        with patch("os.stat", looked_at), self.assertRaises(StoreError) as caught:
            canonicalise(self.fd, "t", None, set())
        self.assertEqual(caught.exception.text, "file 'f' was exchanged while it was in use")
        self.assertEqual(self.mode("t/f"), 0o640)
        self.assertEqual(len(os.listdir("/proc/self/fd")), number)

    def test_trouble_with_attributes(self) -> None:
        """B21: a file system without attributes is fine, one that keeps them is not."""
        self.make("t", File(b"x"))

        def refuse(number: int) -> Callable[..., list[str]]:
            def attributes(*_: object) -> list[str]:
                raise OSError(number, os.strerror(number))

            return attributes

        with patch("os.listxattr", refuse(errno.ENOTSUP)):
            canonicalise(self.fd, "t", None, set())
        with patch("os.listxattr", refuse(errno.EIO)):
            self.assertRaises(StoreError, canonicalise, self.fd, "t", None, set())
        with patch("os.listxattr", lambda _: ["user.one", "user.two"]):
            with patch("os.removexattr", refuse(errno.ENODATA)):
                canonicalise(self.fd, "t", None, set())
            with patch("os.removexattr", refuse(errno.EPERM)):
                self.assertRaises(StoreError, canonicalise, self.fd, "t", None, set())


@requires_root
class OwnerTests(TreeTestCase):
    def test_build_user(self) -> None:
        """S7 B21: what a build user made becomes the daemon's, hard links included."""
        self.make("t", {b"a": File(b"x"), b"d": {b"l": Link(b"x")}}, BUILDER)
        os.link(self.at("t/a"), self.at("t/d/b"))
        os.chmod(self.at("t/a"), 0o4711)
        canonicalise(self.fd, "t", BUILDER, set())
        for name in ("t", "t/a", "t/d", "t/d/l", "t/d/b"):
            status = os.lstat(self.at(name))
            self.assertEqual((status.st_uid, status.st_gid), (0, os.getegid()))
        self.assertEqual(self.mode("t/a"), 0o555)
        self.assertEqual(os.lstat(self.at("t/a")).st_nlink, 2)

    def test_hard_link_to_foreign_file(self) -> None:
        """S7 B22: a hard link to another's file is refused and the file left as it was."""
        self.make("secret", File(b"root:x:1:"))
        os.chmod(self.at("secret"), 0o600)
        before = os.lstat(self.at("secret"))
        self.make("t", {b"d": {}}, BUILDER)
        os.link(self.at("secret"), self.at("t/d/mine"))
        with self.assertRaises(BuildError) as caught:
            canonicalise(self.fd, "t", BUILDER, set())
        self.assertEqual(caught.exception.text, "invalid ownership on 't/d/mine'")
        after = os.lstat(self.at("secret"))
        for field in ("st_mode", "st_uid", "st_gid", "st_mtime_ns"):
            self.assertEqual(getattr(after, field), getattr(before, field))

    def test_hard_link_between_outputs(self) -> None:
        """S7: outputs of one build may share files; those of another build may not."""
        self.make("one", {b"f": File(b"x")}, BUILDER)
        self.make("two", {}, BUILDER)
        os.link(self.at("one/f"), self.at("two/f"))
        seen: InodesSeen = set()
        canonicalise(self.fd, "one", BUILDER, seen)
        canonicalise(self.fd, "two", BUILDER, seen)
        os.chown(self.at("two"), BUILDER, -1)
        self.assertRaises(BuildError, canonicalise, self.fd, "two", BUILDER, set())

    def test_foreign_directory(self) -> None:
        """S7: a directory of another user is never accepted."""
        self.make("t", {b"d": {}}, BUILDER)
        os.chown(self.at("t/d"), BUILDER + 1, -1)
        status = os.lstat(self.at("t/d"))
        seen: InodesSeen = {(status.st_dev, status.st_ino)}
        self.assertRaises(BuildError, canonicalise, self.fd, "t", BUILDER, seen)

    def test_devices(self) -> None:
        """B20 I-TYPE: devices are refused everywhere, and keep their modes."""
        self.make("t", {})
        try:
            os.mknod(self.at("t/null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            require(False, "the right to make device files")
        os.chmod(self.at("t/null"), 0o4666)
        for step in (
            lambda: canonicalise(self.fd, "t", None, set()),
            lambda: strip(self.fd, "t"),
            lambda: chown_tree(self.fd, "t", BUILDER, -1),
            lambda: copy_fresh(self.fd, "t", self.fd, "copy"),
            lambda: hash_and_scan(self.fd, "t"),
        ):
            with self.assertRaises(StoreError) as caught:
                step()
            self.assertIn("unsupported type", caught.exception.text)
        self.assertEqual(self.mode("t/null"), 0o4666)

    def test_capabilities_and_access_lists(self) -> None:
        """B21: file capabilities and access control lists are dropped."""
        self.make("t", {b"f": File(b"x", True)})
        capability = bytes.fromhex("0100000200200000000000000000000000000000")
        os.setxattr(self.at("t/f"), "security.capability", capability)
        self.set_access_lists("t/f", "t")
        canonicalise(self.fd, "t", None, set())
        self.assertEqual(os.listxattr(self.at("t/f")), [])
        self.assertEqual(os.listxattr(self.at("t")), [])
        self.assertEqual((self.mode("t"), self.mode("t/f")), (0o555, 0o555))

    def test_labels(self) -> None:
        """B21: what a security module has written on a file stays."""
        self.make("t", File(b"x"))
        try:
            os.setxattr(self.at("t"), "security.label", b"x")
        except OSError:
            require(False, "the right to label files")
        canonicalise(self.fd, "t", None, set())
        self.assertEqual(os.listxattr(self.at("t")), ["security.label"])

    def test_check_output_owner(self) -> None:
        """B20: the top of an output must belong to the build user."""
        self.make("t", {}, BUILDER)
        check_output(self.fd, "t", BUILDER)
        check_output(self.fd, "t", None)
        with self.assertRaises(BuildError) as caught:
            check_output(self.fd, "t", BUILDER + 1)
        self.assertIn("suspicious ownership or permission", caught.exception.text)


class CheckOutputTests(TreeTestCase):
    def test_permissions(self) -> None:
        """S8 B20: an output that others may write to is refused, a missing one missing."""
        self.make("f", File(b"x"))
        for mode, good in ((0o755, True), (0o644, True), (0o664, False), (0o646, False)):
            os.chmod(self.at("f"), mode)
            if good:
                check_output(self.fd, "f", os.geteuid())
            else:
                self.assertRaises(BuildError, check_output, self.fd, "f", os.geteuid())
        os.symlink("f", self.at("link"))
        check_output(self.fd, "link", None)
        self.assertRaises(FileNotFoundError, check_output, self.fd, "none", None)


class StripTests(TreeTestCase):
    def test_strip(self) -> None:
        """B39 X23: special permissions go, the others stay, pipes and sockets too."""
        self.make("t", {b"f": File(b"x", True), b"d": {b"g": File(b"y")}, b"l": Link(b"/")})
        os.mkfifo(self.at("t/pipe"))
        os.chmod(self.at("t/pipe"), 0o666)
        os.chmod(self.at("t/f"), 0o6777)
        os.chmod(self.at("t/d/g"), 0o070)
        os.chmod(self.at("t/d"), 0o3777)
        os.link(self.at("t/f"), self.at("t/d/again"))
        strip(self.fd, "t")
        self.assertEqual(self.mode("t/pipe"), 0o664)
        self.assertEqual(self.mode("t/f"), 0o775)
        self.assertEqual(self.mode("t/d/g"), 0o070)
        self.assertEqual(self.mode("t/d"), 0o1775)

    def test_links_from_outside(self) -> None:
        """CVE-2021-27851: a file with a link from elsewhere is refused, untouched."""
        self.make("secret", File(b"x"))
        os.chmod(self.at("secret"), 0o4606)
        self.make("t", {})
        os.link(self.at("secret"), self.at("t/f"))
        for step in (
            lambda: strip(self.fd, "t"),
            lambda: chown_tree(self.fd, "t", os.geteuid(), -1),
        ):
            with self.assertRaises(StoreError) as caught:
                step()
            self.assertIn("t/f", caught.exception.text)
        self.assertEqual(self.mode("secret"), 0o4606)

    def test_directory_exchanged(self) -> None:
        """CVE-2021-27851, I-PATH: a directory that takes the place of another is not entered."""
        self.make("t", {b"d": {b"f": File(b"x")}})
        self.make("other", {b"g": File(b"y")})
        seen = []

        def visit(_down: Descent, name: str, _status: os.stat_result) -> None:
            seen.append(name)
            if name == "d":
                os.rename(self.at("t/d"), self.at("away"))
                os.rename(self.at("other"), self.at("t/d"))

        self.assertRaises(StoreError, walk, self.fd, "t", visit)
        self.assertEqual(seen, ["t", "d"])

    def test_links_planted(self) -> None:
        """CVE-2021-27851: so is one that was planted when the links had been counted."""
        self.make("secret", File(b"x"))
        os.chmod(self.at("secret"), 0o4606)
        self.make("t", {})
        check = canonical._check_links

        def slow(*args: Any) -> Any:
            links = check(*args)
            os.link(self.at("secret"), self.at("t/f"))
            return links

        self.patch(canonical, "_check_links", slow)
        before = os.lstat(self.at("secret"))
        for step in (
            lambda: strip(self.fd, "t"),
            lambda: chown_tree(self.fd, "t", BUILDER if is_root() else os.geteuid(), -1),
        ):
            self.assertRaises(StoreError, step)
            os.unlink(self.at("t/f"))
        self.assertEqual(self.mode("secret"), 0o4606)
        self.assertEqual(os.lstat(self.at("secret")).st_uid, before.st_uid)

    def test_attributes(self) -> None:
        """CVE-2025-52992: access control lists permit nothing either, on directories and files."""
        self.make("t", {b"f": File(b"x"), b"d": {b"p": File()}})
        self.set_access_lists("t/d/p", "t")
        os.setxattr(self.at("t/f"), "user.note", b"x")
        os.chmod(self.at("t/f"), 0o444)
        strip(self.fd, "t")
        self.assertEqual(self.mode("t/f"), 0o444)
        for name in ("t", "t/f", "t/d/p"):
            self.assertEqual(os.listxattr(self.at(name)), [])


@requires_root
class ChownTests(TreeTestCase):
    def test_chown(self) -> None:
        """X23: the whole tree changes hands, links themselves and not what they lead to."""
        self.make("outside", File(b"x"))
        self.make("t", {b"d": {b"f": File(b"x")}, b"l": Link(b"../outside")})
        group = os.lstat(self.at("t")).st_gid
        chown_tree(self.fd, "t", BUILDER, -1)
        for name in ("t", "t/d", "t/d/f", "t/l"):
            status = os.lstat(self.at(name))
            self.assertEqual((status.st_uid, status.st_gid), (BUILDER, group))
        self.assertEqual(os.lstat(self.at("outside")).st_uid, 0)


class CopyTests(TreeTestCase):
    TREE: Tree = {
        b"f": File(b"x" * 3_000_000),
        b"e": File(),
        b"d": {b"x": File(b"y", True)},
        b"l": Link(b"f"),
    }

    def test_exchanged(self) -> None:
        """I-PATH: what has taken the place of a file that was looked at is not copied."""
        self.make("t", {b"f": File(b"x")})
        self.make("other", File(b"secret"))
        really_open = os.open

        def late(name: Any, *args: Any, **named: Any) -> int:
            if name == "f" and os.path.exists(self.at("other")):
                os.rename(self.at("other"), self.at("t/f"))
            return really_open(name, *args, **named)

        with patch("os.open", late):
            self.assertRaises(StoreError, copy_fresh, self.fd, "t", self.fd, "copy")
        self.assertEqual(os.listdir(self.at("copy")), [])

    def test_copy(self) -> None:
        """I-FRESH, B21: a copy has the same contents, permissions and links, but other inodes."""
        self.make("t", self.TREE)
        os.link(self.at("t/f"), self.at("t/d/f"))
        os.chmod(self.at("t/e"), 0o664)
        os.chmod(self.at("t/d"), 0o500)
        os.mkdir(self.at("private"))
        private = os.open(self.at("private"), os.O_RDONLY)
        self.addCleanup(os.close, private)
        copy_fresh(self.fd, "t", private, "c")
        self.assertEqual(
            read_tree(os.fsencode(self.at("private/c"))), read_tree(os.fsencode(self.at("t")))
        )
        self.assertEqual(self.mode("private/c/e"), 0o664)
        self.assertEqual(self.mode("private/c/d"), 0o500)
        for name in ("f", "e", "d/x", "d/f"):
            copied = os.lstat(self.at(f"private/c/{name}"))
            self.assertNotEqual(copied.st_ino, os.lstat(self.at(f"t/{name}")).st_ino)
            self.assertEqual(copied.st_nlink, 1 + name.endswith("f"))
        with patch("os.link", side_effect=OSError(errno.EMLINK, "too many")):
            copy_fresh(self.fd, "t", private, "again")
        self.assertEqual(os.lstat(self.at("private/again/f")).st_nlink, 1)
        tree = read_tree(os.fsencode(self.at("private/again")))
        self.assertEqual(tree, read_tree(os.fsencode(self.at("t"))))

    def test_descriptor_kept_open(self) -> None:
        """CVE-2024-27297: a descriptor of the original does not reach the copy."""
        self.make("t", File(b"good"))
        with open(self.at("t"), "r+b", buffering=0) as smuggled:  # noqa: PTH123
            copy_fresh(self.fd, "t", self.fd, "c")
            smuggled.write(b"evil")
        self.assertEqual(read_tree(os.fsencode(self.at("c"))), File(b"good"))

    def test_planted_names(self) -> None:
        """CVE-2026-39860: a name that exists at the target is an error, whatever it is."""
        self.make("t", File(b"x"))
        self.make("canary", {b"f": File(b"canary")})
        for plant in (File(b"x"), Link(b"canary"), Link(b"canary/new"), {}):
            for source in ("t", "canary"):
                self.make("c", plant)
                self.assertRaises(StoreError, copy_fresh, self.fd, source, self.fd, "c")
                os.rmdir(self.at("c")) if plant == {} else os.unlink(self.at("c"))
        self.assertEqual(read_tree(os.fsencode(self.at("canary"))), {b"f": File(b"canary")})

    def test_odd_permissions(self) -> None:
        """I-FRESH: setuid does not get into the copy; special files are refused."""
        self.make("t", {b"f": File(b"x")})
        os.chmod(self.at("t/f"), 0o6755)
        copy_fresh(self.fd, "t", self.fd, "c")
        self.assertEqual(self.mode("c/f"), 0o755)
        os.mkfifo(self.at("t/pipe"))
        self.assertRaises(StoreError, copy_fresh, self.fd, "t", self.fd, "c2")


@requires_root
class CopyOwnerTests(TreeTestCase):
    def test_owner(self) -> None:
        """B22 I-FRESH: owners are copied, so that a foreign file is still found out."""
        self.make("t", CopyTests.TREE, BUILDER)
        os.chown(self.at("t/d/x"), 0, 0)
        copy_fresh(self.fd, "t", self.fd, "c")
        self.assertEqual(os.lstat(self.at("c/l")).st_uid, BUILDER)
        self.assertEqual(os.lstat(self.at("c/d/x")).st_uid, 0)
        self.assertRaises(BuildError, canonicalise, self.fd, "c", BUILDER, set())
