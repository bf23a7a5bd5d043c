"""The sockets that clients connect to."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadSetting
from guixd.service.listening import (
    DEFAULT_PORT,
    BoundSocket,
    ListenError,
    activated,
    open_all,
    open_endpoint,
    open_unix,
    split_host_port,
)
from tests.support import temporary_directory


def mode(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


class UnixTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)

    def open(self, path: str) -> BoundSocket:
        bound = open_unix(path)
        self.addCleanup(bound.close)
        return bound

    def connects(self, bound: BoundSocket) -> bool:
        """Whether a connection to the socket's file reaches BOUND."""
        assert bound.file is not None
        fd = os.open(bound.file, os.O_PATH)
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"/proc/self/fd/{fd}")
                bound.socket.accept()[0].close()
        finally:
            os.close(fd)
        return True

    def test_modes(self) -> None:
        """O7: socket 0666 and made directories 0755, whatever the umask."""
        previous = os.umask(0o077)
        self.addCleanup(os.umask, previous)
        path = self.directory + "/a/b/socket"
        self.assertTrue(self.connects(self.open(path)))
        self.assertEqual(mode(path), 0o666)
        self.assertEqual(mode(self.directory + "/a"), 0o755)
        self.assertEqual(mode(self.directory + "/a/b"), 0o755)

    def test_long_directory(self) -> None:
        """O6: only the base name limits."""
        path = f"{self.directory}/{'d' * 120}/socket"
        self.assertTrue(self.connects(self.open(path)))

    def test_long_name(self) -> None:
        """O6: up to 105 bytes, in a long directory, too; more are too long."""
        for directory in ("", "/" + "d" * 120):
            path = f"{self.directory}{directory}/{'n' * 105}"
            self.assertTrue(self.connects(self.open(path)))
            self.assertEqual(mode(path), 0o666)
            self.assertEqual(os.listdir(os.path.dirname(path)).count("n" * 105), 1)
        error = self.assertRaises(ListenError, open_unix, f"{self.directory}/{'n' * 110}")
        self.assertIn("too long", error.text)

    def test_stale(self) -> None:
        """O8: the socket of a daemon that is gone is replaced."""
        path = self.directory + "/socket"
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(path)
        dead.close()
        self.assertTrue(self.connects(self.open(path)))

    def test_in_use(self) -> None:
        path = self.directory + "/socket"
        bound = self.open(path)
        error = self.assertRaises(ListenError, open_unix, path)
        self.assertIn("in use", error.text)
        bound.socket.accept()[0].close()  # the probe
        self.assertTrue(self.connects(bound))

    def test_no_socket(self) -> None:
        """What is no socket is left alone."""
        for name in ("file", "directory", "link"):
            path = f"{self.directory}/{name}"
            if name == "file":
                Path(path).write_text("precious")
            elif name == "directory":
                os.mkdir(path)
            else:
                os.symlink("file", path)
            before = os.lstat(path)
            self.assertRaises(ListenError, open_unix, path)
            self.assertEqual(os.lstat(path).st_ino, before.st_ino)

    def test_removal(self) -> None:
        """The file goes with the socket, unless it is somebody else's by now."""
        path = self.directory + "/socket"
        first = open_unix(path)
        os.rename(path, path + ".old")
        second = self.open(path)
        first.close()
        self.assertTrue(os.path.exists(path))
        second.close()
        self.assertFalse(os.path.exists(path))

    def test_all_or_none(self) -> None:
        Path(self.directory, "file").touch()
        path = self.directory + "/socket"
        self.assertRaises(ListenError, open_all, [path, self.directory + "/file"], {})
        self.assertFalse(os.path.exists(path))


class TCPTests(SynchronousTestCase):
    def test_split(self) -> None:
        """O5, O26: the default port, literals, and what is refused."""
        for endpoint, expected in (
            ("localhost", ("localhost", DEFAULT_PORT)),
            ("localhost:12", ("localhost", 12)),
            ("127.0.0.1:0", ("127.0.0.1", 0)),
            ("::1", ("::1", DEFAULT_PORT)),
            ("[::1]", ("::1", DEFAULT_PORT)),
            ("[::1]:7", ("::1", 7)),
        ):
            self.assertEqual(split_host_port(endpoint), expected)
        self.assertEqual(DEFAULT_PORT, 44146)
        for wrong in ("", ":1", "host:", "host:x", "host:65536", "[host]:1", "host:+1", "[::1]x:"):
            self.assertRaises(BadSetting, split_host_port, wrong)

    def test_serves(self) -> None:
        """O4, O26: addresses of both families accept connections."""
        for endpoint in ("127.0.0.1:0", "[::1]:0"):
            for bound in open_endpoint(endpoint):
                self.addCleanup(bound.close)
                with socket.create_connection(bound.socket.getsockname()[:2]):
                    bound.socket.accept()[0].close()

    def test_taken(self) -> None:
        (bound,) = open_endpoint("127.0.0.1:0")
        self.addCleanup(bound.close)
        port = bound.socket.getsockname()[1]
        self.assertRaises(ListenError, open_endpoint, f"127.0.0.1:{port}")

    def test_unknown(self) -> None:
        error = self.assertRaises(ListenError, open_endpoint, "no.such.host.invalid:1")
        self.assertIn("failed to look up", error.text)
        error = self.assertRaises(ListenError, open_endpoint, "./socket")
        self.assertIn("failed to look up './socket'", error.text)
        self.assertIn("begins with '/'", error.text)
        self.assertNotIn("idna", error.text)


class ActivationTests(SynchronousTestCase):
    def pass_socket(self) -> int:
        """Return the number of an inheritable descriptor of a listening socket."""
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(temporary_directory(self) + "/socket")
        listening.listen()
        os.set_inheritable(listening.fileno(), True)
        return listening.detach()

    def test_used(self) -> None:
        """O9: passed descriptors are used, closed on exec, and their file is kept."""
        number = self.pass_socket()
        environ = {"LISTEN_PID": "123", "LISTEN_FDS": "1"}
        (bound,) = activated(environ, 123, number)
        self.assertEqual(bound.socket.fileno(), number)
        self.assertFalse(os.get_inheritable(number))
        path = bound.socket.getsockname()
        bound.close()
        self.assertTrue(os.path.exists(path))

    def test_ignored(self) -> None:
        """O9: variables for another process, or malformed ones, count for nothing."""
        number = self.pass_socket()
        self.addCleanup(os.close, number)
        for environ in (
            {"LISTEN_PID": "124", "LISTEN_FDS": "1"},
            {"LISTEN_PID": "123"},
            {"LISTEN_FDS": "1"},
            {"LISTEN_PID": "123", "LISTEN_FDS": "0"},
            {"LISTEN_PID": "123", "LISTEN_FDS": "x"},
        ):
            self.assertEqual(activated(environ, 123, number), [])

    def test_no_socket(self) -> None:
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        self.addCleanup(os.close, writing)
        environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
        self.assertRaises(ListenError, activated, environ, 1, reading)
