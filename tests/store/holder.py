"""Another process that holds locks as daemons do, with the kernel's record locks."""

from __future__ import annotations

import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

_SCRIPT = """
import fcntl, os, struct, sys
files = {}
def flock(kind):
    return struct.pack("@hhqqi0q", kind, 0, 0, 0, 0)
for line in sys.stdin:
    word, _, name = line.rstrip("\\n").partition(" ")
    if name not in files:
        files[name] = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    fd, answer = files[name], "yes"
    kinds = {"read": fcntl.F_RDLCK, "write": fcntl.F_WRLCK, "drop": fcntl.F_UNLCK,
             "wait": fcntl.F_WRLCK}
    try:
        if word == "stale":
            os.unlink(name)
            os.write(fd, b"d")
            os.close(files.pop(name))
        elif word == "empty":
            answer = str(os.fstat(fd).st_size == 0)
        else:
            if word == "wait":
                print("waiting", flush=True)
            fcntl.fcntl(fd, fcntl.F_SETLKW if word == "wait" else fcntl.F_SETLK,
                        flock(kinds[word]))
    except OSError as error:
        answer = "no"
    print(answer, flush=True)
"""


class Holder:
    """The other process; it ends with the test CASE, or when killed."""

    def __init__(self, case: SynchronousTestCase) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        case.addCleanup(self.kill)

    def ask(self, word: str, name: str) -> str:
        """Have it `read`, `write`, `wait` for, `drop` or make `stale` the lock file NAME."""
        self.begin(word, name)
        return self.answer()

    def begin(self, word: str, name: str) -> None:
        """Ask without reading the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word} {name}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Read one answer."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def kill(self) -> None:
        """End it without any chance to clean up."""
        self.process.kill()
        self.process.communicate()
