"""Unpacking archives of directories that anybody may have made (spec: downloads §8)."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from guixd.build import treebox
from tests.support import temporary_directory

TOP = "swh:1:dir:" + "0" * 40


def tar_of(*entries: tuple[str, Any], top: str = TOP) -> bytes:
    """Return an archive, compressed by gzip, of a directory with ENTRIES.

    :param entries: names, with contents as bytes, targets of links as text, modes with
        contents as pairs, other fields of members as dictionaries, or `None` for directories.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        for name, what in ((top, None), *entries):
            member = tarfile.TarInfo(name if name.startswith(("/", top)) else f"{top}/{name}")
            data, member.mode = b"", 0o644
            if what is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(what, str):
                member.type, member.linkname = tarfile.SYMTYPE, what
            elif isinstance(what, dict):
                for field, value in what.items():
                    setattr(member, field, value)
            elif isinstance(what, tuple):
                member.mode, data = what
            else:
                data = what
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


class UnpackTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.inside = Path(self.directory, "inside")
        self.inside.mkdir()
        self.canary = Path(self.directory, "canary")
        self.canary.write_text("alive")
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.inside)

    def unpack(self, data: bytes) -> None:
        Path("archive").write_bytes(data)
        treebox.unpack("archive", "out")

    def test_trees(self) -> None:
        """All that Git keeps, in any order; special bits of modes are dropped."""
        self.unpack(
            tar_of(
                ("b/deep/file", b"1" * 100_000),
                ("b", None),
                ("program", (0o6755, b"#!")),
                ("link", "/etc/passwd"),
                ("dangling", "../../" + "x" * 300),
                ("n\u00e4me\n" + "x" * 200, b""),
                ("empty", None),
            )
        )
        out = self.inside / "out"
        self.assertEqual((out / "b/deep/file").read_bytes(), b"1" * 100_000)
        self.assertEqual((out / "program").stat().st_mode & 0o7777, 0o755)
        self.assertEqual((out / "b/deep/file").stat().st_mode & 0o7777, 0o644)
        self.assertEqual(os.readlink(out / "link"), "/etc/passwd")
        self.assertEqual(os.readlink(out / "dangling"), "../../" + "x" * 300)
        names = ["b", "dangling", "empty", "link", "n\u00e4me\n" + "x" * 200, "program"]
        self.assertEqual(sorted(os.listdir(out)), names)

    def test_hostile(self) -> None:
        """Nothing leads outside, and nothing but files, directories and links is made."""
        canary, plain = str(self.canary), tarfile.REGTYPE
        cases: list[tuple[tuple[str, Any], ...]] = [
            (("../../canary", b"x"),),
            ((TOP + "/../x", b"x"),),
            ((canary, b"x"),),
            (("/canary", b"x"),),
            (("a/./b", b"x"),),
            (("a//b", b"x"),),
            ((".git/config", b"x"),),
            (("l", self.directory), ("l/canary", b"x")),
            (("l", canary), ("l", b"x")),
            (("l", "l"), ("l/x", b"x")),
            (("f", b"1"), ("f", b"2")),
            (("f", b"1"), ("f/g", b"2")),
            (("hard", {"type": tarfile.LNKTYPE, "linkname": canary}),),
            (("hard", {"type": tarfile.LNKTYPE, "linkname": f"{TOP}/hard"}),),
            (("device", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),),
            (("block", {"type": tarfile.BLKTYPE, "devmajor": 1, "devminor": 3}),),
            (("pipe", {"type": tarfile.FIFOTYPE}),),
            (("x" * 256, b"x"),),
            (("d/" * 300 + "x", b"x"),),
            (("x", {"type": plain, "pax_headers": {"path": "../../canary"}}),),
        ]
        for number, entries in enumerate(cases):
            with self.assertRaises(treebox._ERRORS, msg=str(entries)):
                self.unpack(tar_of(*entries))
            self.assertEqual(self.canary.read_text(), "alive")
            self.assertEqual(sorted(os.listdir(self.directory)), ["canary", "inside"])
            os.rename("out", f"out{number}")
        self.assertEqual(list(self.inside.rglob("pipe")), [])

    def test_garbage(self) -> None:
        """Incomplete, empty and senseless archives, and several directories in one."""
        good = tar_of(("file", os.urandom(10_000)))
        two = tar_of((TOP + "-other/file", b"x"))
        for data in (b"", b"nonsense" * 100, good[:-5000], two, good[:20]):
            with self.assertRaises(treebox._ERRORS, msg=str(data[:40])):
                self.unpack(data)
            os.rename("out", f"out{os.urandom(8).hex()}")

    def test_too_much(self) -> None:
        """Entries and bytes are limited, whatever their headers say."""
        self.patch(treebox, "MOST_ENTRIES", 10)
        with self.assertRaises(treebox.BadTree):
            self.unpack(tar_of(*((f"f{n}", b"") for n in range(20))))
        os.rename("out", "out1")
        self.patch(treebox, "MOST_BYTES", 10_000)
        with self.assertRaises(treebox.BadTree):
            self.unpack(tar_of(("bomb", b"\0" * 20_000)))
        self.assertFalse((self.inside / "out/bomb").exists())
