"""How the guest is found and entered."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.interop import guest
from tests.support import requires_root, temporary_directory


class Archive(SynchronousTestCase):
    """The Debian archive of this machine, from either form of apt's lists."""

    def test_one_line(self) -> None:
        """A line of sources.list, with options and a final slash."""
        text = (
            "# deb http://no/debian x\ndeb [arch=amd64 trusted=yes] http://a/debian/ trixie main\n"
        )
        self.assertEqual(guest.debian_archive(text), "http://a/debian")

    def test_deb822(self) -> None:
        """A paragraph of a .sources file; the security archive is not meant."""
        text = "Types: deb\nURIs: http://a/debian-security\n\nTypes: deb\nURIs: http://b/debian\n"
        self.assertEqual(guest.debian_archive(text), "http://b/debian")

    def test_none(self) -> None:
        """No archive, no guest."""
        self.assertIsNone(guest.debian_archive("deb http://a/ubuntu noble main\n"))


@requires_root
class View(SynchronousTestCase):
    """A root of one's own, made of another."""

    def test_binds(self) -> None:
        """Directories appear at places that the base does not have, and nothing is left."""
        source = temporary_directory(self, world_readable=True)
        (Path(source) / "file").write_text("seen")
        place = "/gnu/some/place"
        command = guest.view(
            Path("/"), {place: source}, ["sh", "-c", f"cat {place}/file; id -u; pwd"], 1234
        )
        self.assertEqual(subprocess.check_output(command, cwd="/", text=True), "seen1234\n/\n")
        self.assertFalse(os.path.lexists("/gnu/some"))
