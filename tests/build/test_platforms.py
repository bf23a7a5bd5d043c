"""Programs of other machines: 32-bit ones, and those that the kernel has an interpreter for."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

from guixd.settings import this_system
from tests.build.graph import BUSYBOX, World
from tests.build.test_builds import Real
from tests.support import require, requires_root, temporary_directory

UNAME = bytes.fromhex(
    # It walks to the environment, finds "out=", and makes the file of that name;
    "89e6ad8d748604ad85c0744b81386f75743d75f38d5804b941000000baa4010000b805000000cd8089c7"
    # asks uname(2) for the machine, and writes four characters of its name to the file;
    "81ec9001000089e3b87a000000cd8089fb8d8c2404010000ba04000000b804000000cd80"
    # exits with 0, or 9 if there was no "out=".
    "31dbb801000000cd80bb09000000b801000000cd80"
)
"""Instructions of an i386, with the calls of its Linux."""
BASE = 0x08048000


def elf32(code: bytes) -> bytes:
    """Return a static program for an i386 of CODE alone."""
    headers = 52 + 32
    size = headers + len(code)
    return (
        struct.pack(
            "<4s12B2HI3II6H",
            *(b"\x7fELF", 1, 1, 1, *[0] * 9),
            *(2, 3, 1, BASE + headers, 52, 0, 0),
            *(52, 32, 1, 0, 0, 0),
        )
        + struct.pack("<8I", 1, 0, BASE, BASE, size, size, 5, 4096)
        + code
    )


class Handler:
    """A handler of the kernel's binfmt_misc for files that begin with MAGIC."""

    def __init__(self, case: Real, magic: bytes) -> None:
        directory = temporary_directory(case)
        mount = ["mount", "-t", "binfmt_misc", "none", directory]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        require(mounted, "a kernel with binfmt_misc", of_kernel=True)
        case.addCleanup(subprocess.run, ["umount", directory], check=True)
        interpreter = temporary_directory(case) + "/sh"
        shutil.copy(BUSYBOX, interpreter)
        name = f"guixd-test-{os.getpid()}"
        # F: opened now, so that it need not be there in the container.
        rule = f":{name}:M::{magic.decode()}::{interpreter}:F"
        Path(directory, "register").write_text(rule)
        self._rule = Path(directory, name)
        case.addCleanup(self.remove)

    def remove(self) -> None:
        """Let the kernel forget it."""
        if self._rule.exists():
            self._rule.write_text("-1")


@requires_root
class PlatformTests(Real):
    """Builders for other systems than the daemon's."""

    async def test_i686(self) -> None:
        """B30, X13: on x86_64 a 32-bit program runs, and sees a 32-bit machine."""
        require(this_system() == "x86_64-linux", "an x86_64 machine", of_kernel=True)
        program = Path(temporary_directory(self), "uname")
        program.write_bytes(elf32(UNAME))
        program.chmod(0o755)
        try:
            subprocess.run([program], env={}, check=False)
        except OSError:
            require(False, "a kernel that runs 32-bit programs", of_kernel=True)
        world = self.world
        item = world.file("uname", program.read_bytes(), executable=True)
        for platform, machine in ("i686-linux", "i686"), ("x86_64-linux", "x86_"):
            drv = world.derive(platform, builder=item, sources=[item], platform=platform)
            await self.succeed(drv)
            self.assertEqual(Path(world.output(drv)).read_text(), machine)

    async def test_interpreter(self) -> None:
        """B30: what the kernel has an interpreter for runs, in a container or not."""
        magic = f"# guixd-test-{os.getpid()}-{os.urandom(4).hex()}\n".encode()
        for use_chroot in True, False:
            world = self.world = World(self, use_chroot=use_chroot)
            program = world.file("program", magic + b'echo "it $1" > $out\n', executable=True)
            drv = world.derive(
                "riscv", "ran", builder=program, sources=[program], platform="riscv64-linux"
            )
            observer = await self.fail_with(100, drv)
            line = f"@ unsupported-platform {drv} riscv64-linux\n"
            self.assertTrue(observer.text.startswith(line), observer.text)
            handler = Handler(self, magic.rstrip())
            await self.succeed(drv)
            handler.remove()
            # Its arguments: -e -c SCRIPT.
            self.assertEqual(Path(world.output(drv)).read_text(), "it -e\n")
