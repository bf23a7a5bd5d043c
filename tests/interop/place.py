"""A store at /gnu/store with its state at /var/guix, for either daemon and its clients.

The names are those that a stock client has built in, so that store paths and output can
be compared between daemons word by word; the directories behind them are a test's own.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.interop import guest
from tests.signatures import keys
from tests.support import temporary_directory

SCENARIOS = Path(__file__).with_name("scenarios")
CHECKOUT = Path(__file__).parents[2]
CLIENT_SECONDS = 60
TOOLS = (
    "sh", "cat", "chmod", "cut", "dd", "echo", "env", "grep", "head", "id", "kill", "ln", "ls",
    "mkdir", "mkfifo", "readlink", "sed", "seq", "sleep", "sort", "stat", "tail", "touch",
    "hostname", "ip", "awk",
)  # fmt: skip

GUIXD = "guixd"
STOCK = "guix-daemon"

VERIFIED = ["reading the store...", "checking path existence...", "checking hashes..."]
"""What the stock daemon says of a store that is all right."""


class Place:
    """Directories of one store, the daemons that serve it, and their clients.

    Daemons get their socket by activation, so that clients can connect at once.
    """

    def __init__(self, case: SynchronousTestCase) -> None:
        self.directory = Path(temporary_directory(case, world_readable=True))
        for name in ("store", "state", "log", "build", "home", "work"):
            (self.directory / name).mkdir()
        for name in ("home", "work"):
            (self.directory / name).chmod(0o1777)
        self.binds = {
            "/gnu/store": str(self.directory / "store"),
            "/var/guix": str(self.directory / "state"),
            "/var/log/guix": str(self.directory / "log"),
        }
        self.guest_binds = guest.with_own_users(self.directory)
        self.names: dict[str, str] = {}
        self.daemon_path = "/usr/local/sbin:/usr/local/bin"
        """Directories that come first in the `PATH` of daemons."""
        (self.directory / "state/daemon-socket").mkdir()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._tools()
        for scenario in SCENARIOS.iterdir():
            shutil.copy(scenario, self.directory / "work")
        guest.BuildUsers.claim()
        case.addCleanup(guest.BuildUsers.release)
        case.addCleanup(self.stop)

    def _tools(self) -> None:
        """Make the directory tree that builders have for their programs."""
        tools = self.directory / "work/tools/bin"
        tools.mkdir(parents=True)
        shutil.copy(guest.root() / "bin/busybox", tools / "busybox")
        for tool in TOOLS:
            (tools / tool).symlink_to("busybox")

    def start(
        self,
        daemon: str,
        *options: str,
        name: str = "socket",
        tcp: bool = False,
        substitutes: bool = False,
    ) -> None:
        """Start DAEMON, `GUIXD` or `STOCK`, with OPTIONS.

        :param name: of its socket, in the directory that has the usual one.
        :param tcp: let it listen on `port` of this machine's loopback instead.
        :param substitutes: whether it takes substitutes; see `use_keys`.
        """
        assert name not in self._processes
        if daemon == GUIXD:
            base, binds = Path("/"), self.binds
            command = [sys.executable, "-m", "guixd", f"--build-uids={guest.BUILD_UIDS}"]
        else:
            base, binds = guest.root(), {**self.binds, **self.guest_binds}
            command = ["guix-daemon", "--build-users-group=guixbuild"]
        command += ["--no-offload", *options]
        command += [] if substitutes else ["--no-substitutes"]
        environment = {
            "PATH": f"{self.daemon_path}:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "HOME": str(self.directory / "home"),
            "TMPDIR": str(self.directory / "build"),
            "PYTHONPATH": str(CHECKOUT),
            "PYTHONDONTWRITEBYTECODE": "1",
            **self.names,
        }
        listening = self._listen_tcp() if tcp else self._listen(name)
        activate = 'exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        with listening, (self.directory / "daemon.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                # Signals are ignored here if the tests have been started in the background.
                ["env", "--default-signal", "sh", "-c", activate, "sh",
                 *guest.view(base, binds, command)],
                stdin=listening.fileno(), stdout=log, stderr=log, env=environment, cwd="/",
            )  # fmt: skip

    def _listen(self, name: str) -> socket.socket:
        path = self.directory / "state/daemon-socket" / name
        path.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        path.chmod(0o666)
        listening.listen(64)
        return listening

    def _listen_tcp(self) -> socket.socket:
        listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = listening.getsockname()[1]
        return listening

    def use_keys(self) -> None:
        """Let daemons and clients have a key that is authorized, and this machine's network."""
        keys.install(self.directory / "etc", acl=True)
        self.binds["/etc/guix"] = str(self.directory / "etc")
        self.names["VIEW_NET"] = "host"

    def kill(self, number: int) -> None:
        """Send signal NUMBER to all daemons, which it ends."""
        while self._processes:
            _, process = self._processes.popitem()
            process.send_signal(number)
            process.wait(20)

    def logs(self) -> list[Path]:
        """Return the logs of builds, at their place on this machine."""
        return [file for file in (self.directory / "log").rglob("*") if file.is_file()]

    def stop(self) -> None:
        """Stop all daemons and wait for their ends."""
        while self._processes:
            _, process = self._processes.popitem()
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise

    def log(self) -> str:
        """Return what the daemons of this place wrote for their administrator."""
        return (self.directory / "daemon.log").read_text(errors="replace")

    def client(
        self, *command: str, user: int | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        """Start COMMAND in the guest with the daemon at the place where it expects it."""
        return subprocess.Popen(
            guest.view(guest.root(), self.binds, command, user),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=self.directory / "work", env={**self._client_environment, **environment},
        )  # fmt: skip

    @property
    def _client_environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "HOME": str(self.directory / "home"),
            "WORK": str(self.directory / "work"),
            "GUILE_AUTO_COMPILE": "0",
            **self.names,
        }

    def pipe(self, data: bytes, *command: str) -> subprocess.CompletedProcess[bytes]:
        """Run COMMAND in the guest with DATA as its input, to its end."""
        return subprocess.run(
            guest.view(guest.root(), self.binds, command), input=data, capture_output=True,
            check=False, cwd=self.directory / "work", env=self._client_environment,
            timeout=CLIENT_SECONDS,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str], *, status: int | None = 0) -> Output:
        """Wait for a client; fail unless it exits with STATUS (any, when None)."""
        try:
            out, err = process.communicate(timeout=CLIENT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"client hangs: {out}{err}\n{self.log()}") from None
        if status is not None and process.returncode != status:
            raise AssertionError(
                f"client exited {process.returncode}, not {status}:\n{out}{err}\n{self.log()}"
            )
        return Output(out, err, process.returncode)

    def run(self, *command: str, status: int | None = 0, user: int | None = None) -> Output:
        """Run COMMAND in the guest to its end."""
        return self.finish(self.client(*command, user=user), status=status)

    def scheme(self, scenario: str, *, user: int | None = None, **environment: str) -> Facts:
        """Run a scenario and return what it showed."""
        return Facts(self.finish(self.scenario(scenario, user=user, **environment)).out)

    def scenario(
        self, scenario: str, *, user: int | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        """Start `guix repl` on the file SCENARIO of the directory scenarios."""
        script = str(self.directory / "work" / scenario)
        return self.client("guix", "repl", "--", script, user=user, **environment)

    def outside(self, item: str) -> Path:
        """Return where the store file name ITEM lies on this machine."""
        return self.directory / "store" / Path(item).relative_to("/gnu/store")


class Output:
    """What a client wrote, and its exit status."""

    def __init__(self, out: str, err: str, status: int) -> None:
        self.out, self.err, self.status = out, err, status

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class Facts(dict[str, str]):
    """The `LABEL: VALUE` lines of a scenario, by label; values in Scheme's notation."""

    def __init__(self, text: str) -> None:
        for line in text.splitlines():
            label, separator, value = line.partition(": ")
            if separator:
                assert label not in self, f"{label} shown twice"
                self[label] = value

    def text(self, label: str) -> str:
        """Return a value that is one string, without its quotes."""
        return self[label].strip('"')

    def strings(self, label: str) -> list[str]:
        """Return the strings in a value, in order."""
        return re.findall(r'"([^"]*)"', self[label])
