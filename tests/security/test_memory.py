"""The daemon's memory does not grow with what a client sends."""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.formats.messages import ANSWER, LAST, Greeting
from guixd.formats.nar import CLOSE, MAGIC, file_header
from guixd.formats.operations import AddToStore
from tests.service.test_program import PROGRAM, WAIT, Program
from tests.support import require

MIB = 1 << 20
SIZE = int(os.environ.get("GUIXD_TEST_LARGE_MIB", "1024")) * MIB
"""Bytes of the file that is added; more by this variable."""
MOST_RESIDENT = 150 * MIB


def most_resident(pid: int) -> int:
    """Return the most bytes of memory that the process PID had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kib) * 1024


class LargeFileTests(SynchronousTestCase):
    def test_add(self) -> None:
        """N10: a file much larger than the memory allowed is added, flat and as an archive."""
        program = Program(self, PROGRAM)
        free = shutil.disk_usage(program.directory).free
        require(free > 2 * SIZE, f"{2 * SIZE // MIB} MiB of free disk space")
        self.assertEqual(program.state(), b"READY=1")
        for recursive, size in (True, SIZE), (False, SIZE // 8):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10 * WAIT)
                client.connect(program.socket)
                client.sendall(Greeting().encode())
                expected = ANSWER + LAST
                self.assertEqual(client.recv(len(expected), socket.MSG_WAITALL), expected)
                client.sendall(AddToStore("large", True, recursive, "sha256").encode())
                client.sendall(MAGIC + file_header(size))
                block = bytes(MIB)
                for number in range(size // MIB):
                    client.sendall(number.to_bytes(8, "little") + block[8:])
                client.sendall(CLOSE)
                self.assertEqual(client.recv(8, socket.MSG_WAITALL), LAST)
                length = int.from_bytes(client.recv(8, socket.MSG_WAITALL), "little")
                path = client.recv(length, socket.MSG_WAITALL).decode()
            self.assertEqual(os.path.getsize(path), size)
            os.unlink(path)
        self.assertLess(most_resident(program.process.pid), MOST_RESIDENT)
        self.assertEqual(program.end()[0], 0)
