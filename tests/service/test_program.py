"""guixd as a program: how it starts, what it needs, how it ends."""

from __future__ import annotations

import grp
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from guixd.formats.messages import ANSWER, Greeting
from tests.service.program import CHECKOUT, PROGRAM, PYTHONPATH, TWISTD, WAIT, Program
from tests.support import is_root, require, requires, temporary_directory


class ProgramTests(SynchronousTestCase):
    def test_life(self) -> None:
        """Started in a directory that is not writable it serves, and leaves nothing behind."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            program = Program(self, PROGRAM)
            self.assertEqual(program.state(), b"READY=1")
            program.greet()
            status, output = program.end(number)
            self.assertEqual(status, 0, output)
            self.assertEqual(program.state().split(b"\n")[0], b"STOPPING=1")
            self.assertFalse(os.path.exists(program.socket))
            self.assertIn("listening on", output)
            self.assertEqual(output.count("not effective"), 1)
            self.assertNotIn("Traceback", output)

    def test_fetcher(self) -> None:
        """What talks to servers starts with the daemon, and ends with it."""
        program = Program(self, PROGRAM)
        program.state()
        program.greet()
        pid = program.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        self.assertIn("guixd.net.fetcher", Path(f"/proc/{children[0]}/cmdline").read_text())
        self.assertEqual(program.end()[0], 0)
        self.assertFalse(os.path.exists(f"/proc/{children[0]}"))

    def test_twistd(self) -> None:
        """`twistd guixd` is the same daemon."""
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
            program = Program(self, [*TWISTD, "--nodaemon", "--pidfile=", "guixd", "--cores=2"])
            self.assertEqual(program.state(), b"READY=1")
            program.greet()
            status, output = program.end(number)
            self.assertIn(status, (0, -number), output)
            self.assertIn("Main loop terminated", output)
            self.assertFalse(os.path.exists(program.socket))

    def test_busy_client(self) -> None:
        """O20: a client at work does not keep the daemon from ending."""
        program = Program(self, PROGRAM)
        program.state()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(program.socket)
            client.sendall(Greeting().encode())
            client.recv(100)
            self.assertEqual(program.end()[0], 0)

    def test_refused(self) -> None:
        """O6, O10: what cannot be listened on, and a relative store, end with status 1."""
        for more, environment, text in (
            (["--listen=/proc/version"], {}, "no socket"),
            (["--listen=/tmp/" + "n" * 110], {}, "too long"),
            ([], {"NIX_STORE_DIR": "store"}, "not an absolute path"),
        ):
            program = Program(self, PROGRAM + more, **environment)
            self.assertEqual(program.process.wait(WAIT), 1)
            output = program.output
            self.assertIn("error: ", output)
            self.assertIn(text, output)
            self.assertNotIn("Traceback", output)

    def test_activation(self) -> None:
        """O9: the socket of the service manager is used, --listen is not."""
        directory = temporary_directory(self)
        listening = socket.socket(socket.AF_UNIX)
        self.addCleanup(listening.close)
        listening.bind(directory + "/passed")
        listening.listen()
        script = 'exec 3<&"$1"; shift; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" --listen=/proc/nowhere'
        os.set_inheritable(listening.fileno(), True)
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": PYTHONPATH,
            "NIX_STORE_DIR": directory + "/store",
            "GUIX_STATE_DIRECTORY": directory + "/var",
        }
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(listening.fileno()), *PROGRAM],
            pass_fds=(listening.fileno(),),
            env=environment,
            stderr=subprocess.PIPE,
        )
        self.addCleanup(process.communicate, timeout=WAIT)
        self.addCleanup(process.terminate)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(WAIT)
            client.connect(directory + "/passed")
            client.sendall(Greeting().encode())
            self.assertEqual(client.recv(16, socket.MSG_WAITALL), ANSWER)

    def test_read_only_store(self) -> None:
        """Root can use a store that is mounted read-only for everybody else."""
        require(is_root(), "root")
        store = temporary_directory(self)
        bind = ["mount", "--bind", store, store]
        subprocess.run(bind, check=True)
        self.addCleanup(subprocess.run, ["umount", store], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", store], check=True)
        program = Program(self, PROGRAM, NIX_STORE_DIR=store)
        program.state()
        program.greet()
        self.assertIn(".links", os.listdir(store))
        self.assertRaises(OSError, os.mkdir, store + "/x")
        self.assertEqual(program.end()[0], 0)

    def test_read_only_disk(self) -> None:
        """On a medium that is read-only each client reads so, until it is writable."""
        require(is_root(), "root")
        store = temporary_directory(self)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", store], check=True)
        self.addCleanup(subprocess.run, ["umount", store], check=True)
        program = Program(self, PROGRAM, NIX_STORE_DIR=store)
        program.state()
        for _ in range(2):
            self.assertRaisesRegex(AssertionError, "read-only", program.greet)
        self.assertEqual(os.listdir(store), [])
        subprocess.run(["mount", "-o", "remount,rw", store], check=True)
        program.greet()
        self.assertIn(".links", os.listdir(store))
        self.assertEqual(program.end()[0], 0)

    def test_socket_in_use(self) -> None:
        """O8: a second daemon on a socket ends with status 1, and the first goes on."""
        first = Program(self, PROGRAM)
        first.state()
        second = Program(self, [*PROGRAM, f"--listen={first.socket}"])
        self.assertEqual(second.process.wait(WAIT), 1)
        self.assertIn("in use", second.output)
        first.greet()
        self.assertEqual(first.end()[0], 0)

    def test_unprivileged(self) -> None:
        """O27: without privileges the daemon serves, and trusts its own user."""
        uid, user = os.geteuid(), []
        if is_root():
            uid = 61999
            user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--", "env"]
            importing = [*user, sys.executable, "-c", "import guixd"]
            if subprocess.run(importing, stderr=subprocess.DEVNULL).returncode:
                raise SkipTest("other users cannot read this checkout")
        program = Program(self, user + PROGRAM, owner=uid)
        self.assertEqual(program.state(), b"READY=1")
        program.greet()
        self.assertEqual(os.stat(program.directory + "/store").st_uid, uid)
        self.assertEqual(program.end()[0], 0)


@requires(lambda: shutil.which("systemd-analyze") is not None, "systemd-analyze")
class UnitTests(SynchronousTestCase):
    def test_verify(self) -> None:
        """The units are what systemd wants."""
        kinds = (".service", ".socket", ".mount")
        units = [str(unit) for unit in (CHECKOUT / "etc").iterdir() if unit.suffix in kinds]
        self.assertEqual(len(units), 4)
        done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))


class CommandTests(SynchronousTestCase):
    def commands(self) -> dict[str, list[str]]:
        """Return the command of each file in etc/ that starts the daemon."""
        found = {}
        for name in ("guixd.service", "guixd-rootless.service", "guixd.conf"):
            text = (CHECKOUT / "etc" / name).read_text()
            (line,) = re.findall(r"^(?:ExecStart=|exec )(.*)$", text, re.MULTILINE)
            # What the shell of the unprivileged unit does before needs root and systemd.
            line = re.sub(
                r"^!/bin/sh -c '(.*)exec setpriv (--\S+ )*(.*)'$", r"/usr/bin/env \3", line
            )
            found[name] = shlex.split(line)
        # Scripts are told where the program is.
        for name, words in (
            ("guixd.init", r'^DAEMON=(\S+)\nOPTIONS="(.*)"$'),
            ("guixd.openrc", r'^command=(\S+)\ncommand_args="(.*)"$'),
        ):
            text = (CHECKOUT / "etc" / name).read_text()
            ((program, options),) = re.findall(words, text, re.MULTILINE)
            self.assertEqual(program, "/usr/local/bin/guixd")
            found[name] = ["/usr/bin/env", "guixd", *options.split()]
        return found

    def test_scripts(self) -> None:
        """Scripts for other inits are programs, and right as far as a shell can tell."""
        for name in "guixd.init", "guixd.openrc":
            script = CHECKOUT / "etc" / name
            self.assertTrue(os.access(script, os.X_OK), name)
            done = subprocess.run(["sh", "-n", script], capture_output=True)
            self.assertEqual((done.returncode, done.stderr), (0, b""), name)

    def test_run(self) -> None:
        """The commands of units and job start a daemon that serves or says why not."""
        programs = temporary_directory(self, world_readable=True)
        script = Path(programs, "guixd")
        script.write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
        script.chmod(0o755)
        for name, command in self.commands().items():
            self.assertEqual(command[:2], ["/usr/bin/env", "guixd"])
            group = [word for word in command if word.startswith("--build-users-group=")]
            if group:
                self.assertEqual(group, ["--build-users-group=guixbuild"])
                command[command.index(group[0])] = (
                    f"--build-users-group={grp.getgrall()[0].gr_name}"
                )
            program = Program(self, command, PATH=f"{programs}:{os.environ['PATH']}")
            self.assertEqual(program.state(), b"READY=1", name)
            program.greet()
            self.assertEqual(program.end()[0], 0)
