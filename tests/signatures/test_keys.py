"""Key files and the access control list: their modes, forms and changes."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadExpression, SignatureError
from guixd.formats.sexp import Expression, parse, pretty
from guixd.signatures import Acl, read_key_pair, read_public_key
from tests.signatures.keys import configuration, golden
from tests.support import temporary_directory

TAG = (b"tag", (b"guix", b"import"))


def key(number: int) -> Expression:
    return (b"public-key", (b"ecc", (b"curve", b"Ed25519"), (b"q", bytes([number]) * 32)))


def acl(*keys: Expression) -> bytes:
    return pretty((b"acl", *((b"entry", one, TAG) for one in keys)))


class Keys(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = configuration(self, acl=False)

    def test_pair(self) -> None:
        pair = read_key_pair(str(self.directory))
        self.assertEqual(pair.public, parse(golden("ecc.pub")))
        self.assertEqual(pair.secret, parse(golden("ecc.sec")))
        self.assertNotIn("680", repr(pair))

    def test_mode(self) -> None:
        """S31: others may not even read the secret key; the other one is public."""
        for mode in 0o440, 0o404, 0o410, 0o666:
            (self.directory / "signing-key.sec").chmod(mode)
            with self.assertRaisesRegex(SignatureError, "signing-key.sec.*0400"):
                read_key_pair(str(self.directory))
        (self.directory / "signing-key.sec").chmod(0o600)
        (self.directory / "signing-key.pub").chmod(0o666)
        read_key_pair(str(self.directory))

    def test_absent(self) -> None:
        for name in "pub", "sec":
            (self.directory / f"signing-key.{name}").unlink()
            with self.assertRaisesRegex(SignatureError, f"signing-key.{name}"):
                read_key_pair(str(self.directory))
        with self.assertRaises(SignatureError):
            read_public_key(str(self.directory))

    def test_malformed(self) -> None:
        for text in b"", b"(public-key", b"(private-key (ecc))", b"x" * (2 << 20):
            (self.directory / "signing-key.pub").chmod(0o644)
            (self.directory / "signing-key.pub").write_bytes(text)
            with self.assertRaisesRegex(BadExpression, "signing-key.pub"):
                read_public_key(str(self.directory))


class AccessControl(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(temporary_directory(self))
        self.file = self.directory / "acl"
        self.acl = Acl(str(self.directory))

    def test_entries(self) -> None:
        self.file.write_bytes(acl(key(1), key(2)))
        self.assertEqual(self.acl.keys(), {key(1), key(2)})
        self.assertFalse(self.acl.authorises(key(3)))
        self.file.write_bytes(acl())
        self.assertEqual(self.acl.keys(), frozenset())

    def test_changes_count_at_once(self) -> None:
        """Also those that leave size and time as they were."""
        self.file.write_bytes(acl(key(1)))
        self.assertTrue(self.acl.authorises(key(1)))
        self.file.write_bytes(acl(key(1), key(2)))
        self.assertTrue(self.acl.authorises(key(2)))
        before = self.file.stat()
        replacement = self.directory / "new"
        replacement.write_bytes(acl(key(3), key(4)))
        os.utime(replacement, ns=(before.st_atime_ns, before.st_mtime_ns))
        replacement.rename(self.file)
        self.assertEqual(self.file.stat().st_size, before.st_size)
        self.assertEqual(self.acl.keys(), {key(3), key(4)})
        self.file.unlink()
        self.assertEqual(self.acl.keys(), frozenset())

    def test_made(self) -> None:
        """S30: without a list, the host's own key is put into one."""
        directory = configuration(self, acl=False)
        mask = os.umask(0o077)
        try:
            self.assertEqual(Acl(str(directory)).keys(), {parse(golden("ecc.pub"))})
        finally:
            os.umask(mask)
        self.assertEqual((directory / "acl").read_bytes(), golden("ecc.acl"))
        self.assertEqual((directory / "acl").stat().st_mode & 0o7777, 0o644)
        self.assertEqual(len(list(directory.iterdir())), 3)

    def test_made_meanwhile(self) -> None:
        """S30: a list that somebody else makes at the same time is the one that counts."""
        directory = configuration(self, acl=False)

        def others_first(place: str) -> Expression:
            (directory / "acl").write_bytes(acl(key(1)))
            return read_public_key(place)

        with patch("guixd.signatures.acl.read_public_key", others_first):
            self.assertEqual(Acl(str(directory)).keys(), {key(1)})
        self.assertEqual(len(list(directory.iterdir())), 3)

    def test_cannot_be_read(self) -> None:
        directory = configuration(self, acl=False)
        (directory / "acl").mkdir()
        with self.assertRaisesRegex(SignatureError, "acl"):
            Acl(str(directory)).keys()

    def test_malformed(self) -> None:
        """A list that is not one is an error, until it is mended."""
        good = (b"entry", key(1), TAG)
        for text in (
            b"", b"acl", b"(acl", b"(list)", pretty((b"acl", b"x")), pretty((b"acl", key(1))),
            pretty((b"acl", (b"entry", key(1)))),
            pretty((b"acl", good, (b"entry", key(2), (b"tag", (b"guix", b"export"))))),
            pretty((b"acl", (b"entry", key(1), TAG, TAG))),
            pretty((b"acl", (b"entry", b"public-key", TAG))),
            pretty((b"acl", (b"entry", (b"private-key",), TAG))),
        ):  # fmt: skip
            self.file.write_bytes(text)
            for _ in range(2):
                with self.assertRaisesRegex(BadExpression, "access control list.*acl"):
                    self.acl.keys()
        self.file.write_bytes(pretty((b"acl", good)))
        self.assertTrue(self.acl.authorises(key(1)))

    def test_each_mark(self) -> None:
        """A list that is rewritten in place counts, be it only its time or its size that tells."""
        self.file.write_bytes(acl(key(1)))
        before = self.file.stat()
        self.assertEqual(self.acl.keys(), {key(1)})
        self.file.write_bytes(acl(key(2)))
        os.utime(self.file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        self.assertEqual((self.file.stat().st_size, self.acl.keys()), (before.st_size, {key(2)}))
        os.utime(self.file, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.assertEqual(self.acl.keys(), {key(2)})
        self.file.write_bytes(acl())
        os.utime(self.file, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.assertEqual(self.acl.keys(), frozenset())

    def test_kept(self) -> None:
        """A list that has not changed is not read again."""
        self.file.write_bytes(acl(key(1)))
        known = self.acl.keys()
        self.assertIs(self.acl.keys(), known)

    def test_place_is_none(self) -> None:
        """A configuration directory that is none is an error, and not an empty list."""
        self.file.write_bytes(b"")
        with self.assertRaisesRegex(SignatureError, "cannot read .*acl/acl': Not a directory"):
            Acl(str(self.file)).keys()

    def test_shortcoming(self) -> None:
        """U29: whose signatures do not count, and what to do about it."""
        directory = configuration(self, acl=False)
        own, file = parse(golden("ecc.pub")), directory / "acl"
        control = Acl(str(directory))
        for keys, who in (
            ((), "nobody is authorised"),
            ((own,), "only this machine itself is authorised"),
            ((key(1),), ""),
            ((own, key(1)), ""),
        ):
            file.write_bytes(acl(*keys))
            said = control.shortcoming()
            if who:
                self.assertTrue(said.startswith(f"{who} to sign substitutes, so that none"), said)
                self.assertIn(f"authorise their keys in '{file}' by 'guix archive", said)
            else:
                self.assertEqual(said, "")
        # Without a key of its own the machine cannot be the one that is authorised.
        file.write_bytes(acl(own))
        (directory / "signing-key.pub").unlink()
        self.assertEqual(control.shortcoming(), "")
        (directory / "signing-key.pub").write_bytes(b"(")
        self.assertEqual(control.shortcoming(), "")
