"""Archives with the real `guix archive`, from each daemon to the other (spec: store §12)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, Place

REFER = """
(use-modules (guix store))
(with-store s
  (let* ((one (add-text-to-store s "one" "first\\n"))
         (two (add-text-to-store s "two" (string-append one "\\n") (list one))))
    (display one) (newline) (display two) (newline)))
"""


@requires_guest
class Archives(SynchronousTestCase):
    """What one store has comes into another."""

    def store(self, daemon: str) -> Place:
        """Return an empty store that DAEMON serves, with an authorized key of its own."""
        place = Place(self)
        place.use_keys()
        place.start(daemon)
        return place

    def filled(self, daemon: str) -> tuple[Place, list[str]]:
        """Return a store with two items, and a tree."""
        place = self.store(daemon)
        work = place.directory / "work"
        (work / "refer.scm").write_text(REFER)
        items = place.run("guix", "repl", "--", str(work / "refer.scm")).lines
        tree = work / "tree"
        (tree / "sub").mkdir(parents=True)
        (tree / "sub/file").write_bytes(bytes(range(256)) * 1000)
        (tree / "link").symlink_to("sub/file")
        items += place.run(
            "guix",
            "repl",
            "--",
            str(self.script(work, f'(add-to-store s "tree" #t "sha256" "{tree}")')),
        ).lines
        return place, items

    @staticmethod
    def script(work: Path, body: str) -> Path:
        script = work / "body.scm"
        script.write_text(f"(use-modules (guix store))\n(display (with-store s {body}))\n")
        return script

    @staticmethod
    def piped(place: Place, data: bytes, *command: str) -> tuple[int, bytes, str]:
        """Run a client that reads DATA; return its status and what it wrote."""
        running = place.pipe(data, *command)
        return running.returncode, running.stdout, running.stderr.decode(errors="replace")

    def test_both_ways(self) -> None:
        """P29, S23, S27: with all that it refers to, from each daemon to the other."""
        archives = {}
        for source, target in ((STOCK, GUIXD), (GUIXD, STOCK)):
            place, items = self.filled(source)
            status, archive, errors = self.piped(
                place, b"", "guix", "archive", "--export", "-r", items[1], items[2]
            )
            self.assertEqual(status, 0, errors)
            archives[source] = archive
            place.stop()
            other = self.store(target)
            status, _, errors = self.piped(
                other, b"\n".join(map(str.encode, items)) + b"\n", "guix", "archive", "--missing"
            )
            self.assertEqual(status, 0, errors)
            status, _out, errors = self.piped(other, archive, "guix", "archive", "--import")
            self.assertEqual(status, 0, errors)
            for item in items:
                self.assertTrue(other.outside(item).exists(), item)
            self.assertEqual(
                (other.outside(items[2]) / "sub/file").read_bytes(), bytes(range(256)) * 1000
            )
            self.assertEqual(other.run("guix", "gc", "--references", items[1]).lines, [items[0]])
            other.run("guix", "gc", "--verify=contents")
            other.stop()
        # The same keys sign the same bytes in the same way.
        self.assertEqual(archives[STOCK], archives[GUIXD])

    def test_refused(self) -> None:
        """S24: what another key has signed, was changed or is cut short."""
        place, items = self.filled(GUIXD)
        _, archive, _ = self.piped(place, b"", "guix", "archive", "--export", items[0])
        place.stop()
        changed = archive.replace(b"first\n", b"worst\n")
        cut = archive[: len(archive) // 2]
        for daemon in STOCK, GUIXD:
            other = self.store(daemon)
            for data, word in ((changed, "corrupt"), (cut, "")):
                status, _, errors = self.piped(other, data, "guix", "archive", "--import")
                self.assertEqual(status, 1, errors)
                self.assertIn(word, errors)
            (other.directory / "etc/acl").write_text("(acl)")
            status, _, errors = self.piped(other, archive, "guix", "archive", "--import")
            self.assertEqual(status, 1)
            self.assertIn("unauthorized public key", errors)
            self.assertFalse(other.outside(items[0]).exists())
            other.stop()

    def test_keys(self) -> None:
        """`guix archive --authorize` counts at once."""
        place, items = self.filled(GUIXD)
        _, archive, _ = self.piped(place, b"", "guix", "archive", "--export", items[0])
        place.stop()
        other = self.store(GUIXD)
        public = (other.directory / "etc/signing-key.pub").read_bytes()
        (other.directory / "etc/acl").write_text("(acl)")
        self.assertEqual(self.piped(other, archive, "guix", "archive", "--import")[0], 1)
        status, _, errors = self.piped(other, public, "guix", "archive", "--authorize")
        self.assertEqual(status, 0, errors)
        self.assertEqual(self.piped(other, archive, "guix", "archive", "--import")[0], 0)
        self.assertTrue(other.outside(items[0]).exists())


@requires_guest
class Remote(SynchronousTestCase):
    """Clients that come over the network, or through a relay."""

    def test_relay(self) -> None:
        """A client whose socket is a relay to the daemon's, as `ssh://` makes it."""
        place = Place(self)
        place.start(GUIXD)
        real = place.directory / "state/daemon-socket/socket"
        moved = place.directory / "state/daemon-socket/real"
        real.rename(moved)
        python = shutil.which("python3")
        assert python is not None
        relay = subprocess.Popen(
            [python, "-c", _RELAY, str(real), str(moved)], stdout=subprocess.PIPE, text=True
        )

        def stop() -> None:
            relay.terminate()
            relay.communicate()

        self.addCleanup(stop)
        assert relay.stdout is not None
        relay.stdout.readline()
        source = place.directory / "work/file"
        source.write_text("through a relay")
        item = place.run("guix", "download", str(source)).lines[0]
        self.assertEqual(place.outside(item).read_text(), "through a relay")
        self.assertIn(item, place.run("guix", "gc", "--list-dead").lines)


_RELAY = """
import os, socket, sys, threading
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
listening.listen(8)
print("ready", flush=True)
def pump(a, b):
    while data := a.recv(65536):
        b.sendall(data)
    b.shutdown(socket.SHUT_WR)
while True:
    near, _ = listening.accept()
    far = socket.socket(socket.AF_UNIX)
    far.connect(sys.argv[2])
    for pair in (near, far), (far, near):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""
