"""Builds with a network, and who moves their packets, as the kernel shows them."""

from __future__ import annotations

import os
import platform
import select
import signal
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet import reactor as installed
from twisted.internet.defer import CancelledError
from twisted.internet.protocol import DatagramProtocol
from twisted.logger import capturedLogs
from twisted.trial.unittest import TestCase
from twisted.web.resource import Resource
from twisted.web.server import Site

import guixd.build.zygote
from guixd.build.launcher import BuilderProcess
from guixd.build.uplink import connect
from guixd.errors import SandboxError
from guixd.sandbox import kernel
from guixd.sandbox.spec import SandboxSpec
from guixd.uplink.devices import DEVICE
from tests.build.test_limits import control_groups
from tests.sandbox.place import Outcome, Place, Recorder
from tests.sandbox.test_launcher import builders_of, descriptors_of
from tests.support import require, requires_user_namespaces, temporary_directory
from tests.uplink.slirp import requires_slirp, script, slirp_directory

_WITH_DEVICE = (
    "from guixd.sandbox import kernel; kernel.unshare(kernel.NEWNS); "
    "kernel.mount('none', '/', '', kernel.MS_REC | kernel.MS_PRIVATE); "
    "kernel.mount('{node}', '{device}', '', kernel.MS_BIND); os.setgroups"
)
reactor: Any = installed
_SPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


_OTHER_MACHINE = (
    "import os; from guixd.sandbox import kernel; from guixd.uplink import devices; "
    "kernel.unshare(kernel.NEWNS | kernel.NEWNET); devices.bring_up_loopback(); "
    "kernel.mount('none', '/', '', kernel.MS_REC | kernel.MS_PRIVATE); "
    "kernel.mount('{resolver}', os.path.realpath('/etc/resolv.conf'), '', kernel.MS_BIND); "
)
"""A network and a name server of its own for a zygote and all that it starts."""


def name_socket(pid: int) -> socket.socket:
    """Return the socket of a name server in the network of the process PID."""

    def make() -> socket.socket:
        with Path(f"/proc/{pid}/ns/net").open() as space:
            kernel.setns(space.fileno(), kernel.NEWNET)
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("127.0.0.1", 53))
        server.setblocking(False)
        return server

    with ThreadPoolExecutor(1) as thread:  # which is over then: it stays in that network
        return thread.submit(make).result()


class Names(DatagramProtocol):
    """A name server for which all names are those of 203.0.113.7."""

    asked = b""

    def datagramReceived(self, datagram: bytes, addr: tuple[str, int]) -> None:
        self.asked += datagram
        answer = b"\xc0\x0c" + struct.pack("!HHIH4B", 1, 1, 60, 4, 203, 0, 113, 7)
        is_address = datagram[12:].partition(b"\0")[2][:2] == b"\0\x01"
        head = datagram[:2] + struct.pack("!HHHHH", 0x8180, 1, is_address, 0, 0)
        assert self.transport is not None
        self.transport.write(head + datagram[12:] + answer * is_address, addr)


_HOSTILE = f"""#!/usr/bin/python3
import os, socket

def attempt(name, action):
    try:
        action()
    except OSError as error:
        print(f"{{name}}: {{error.strerror}}")
    else:
        print(f"{{name}}: possible")

def connect():
    socket.socket(socket.AF_UNIX).connect("\\0guixd-test-{os.getpid()}")

names = open("/proc/net/unix").read()
print("abstract names:", "seen" if "@guixd-test" in names else "")
print("processes:", *sorted(filter(str.isdigit, os.listdir("/proc"))))
print("descriptors:", *(fd for fd in range(99) if os.path.exists(f"/proc/self/fd/{{fd}}")))
attempt("internet", lambda: socket.socket(socket.AF_INET).close())
attempt("connect", connect)
attempt("pass on", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
attempt("packets", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
attempt("secrets", lambda: open("/etc/shadow").read())
attempt("homes", lambda: os.listdir("/root"))
attempt("trees", lambda: os.listdir("/var"))
attempt("plant", lambda: open("/usr/bin/planted", "w"))
attempt("plant here", lambda: os.mkdir("/planted"))
attempt("root", lambda: os.setuid(0))
"""


class Page(Resource):
    """What is fetched."""

    isLeaf = True

    def render_GET(self, request: object) -> bytes:
        return b"fetched\n"


class _Connected:
    """Tests that hold with build users and without."""

    mode = ""
    own_spaces: set[str] = set()
    timeout = 60

    def setUp(self) -> None:
        assert isinstance(self, TestCase)
        self.place = Place(self, self.mode)
        self.slirp = slirp_directory(self)
        if self.mode == "rootless":
            # On most machines anybody may use the device, so that this one can be used as well.
            self.node = temporary_directory(self, world_readable=True) + "/tun"
            os.mknod(self.node, 0o20600, os.stat(DEVICE).st_rdev)
            os.chmod(self.node, 0o666)
            boot = guixd.build.zygote._BOOT
            own = _WITH_DEVICE.format(node=self.node, device=DEVICE)
            self.patch(guixd.build.zygote, "_BOOT", boot.replace("os.setgroups", own, 1))

    def spec(self, text: str, *, isolated: bool = False, path: str = "") -> SandboxSpec:
        self.place.settings = replace(self.place.settings, isolate_host_loopback=isolated)
        spec = self.place.prepare(self.place.derivation(text, fixed=True)).spec
        environ = {"PATH": path or self.slirp}
        return connect(spec, environ, platform.machine(), isolated)

    async def run_connected(self, text: str, *, isolated: bool = False) -> Outcome:
        return await self.place.finish(self.spec(text, isolated=isolated))

    def serve(self) -> int:
        """Serve a page on this machine's loopback; return the port."""
        assert isinstance(self, TestCase)
        port = reactor.listenTCP(0, Site(Page()), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        return int(port.getHost().port)

    async def spawn_waiting(self) -> tuple[BuilderProcess, Recorder, int]:
        """Start a builder that waits; return it, its recorder and the pid of its slirp4netns."""
        process, recorder = await self.place.spawn(self.spec("echo go; $b sleep 1000"))
        await recorder.hear(b"go")
        (moving,) = set(builders_of(self.place.launcher.zygote_pid)) - {process.pid}
        return process, recorder, moving

    async def test_fetch(self) -> None:
        """X29: what the machine serves on its loopback can be fetched, by either address."""
        port = self.serve()
        seen = await self.run_connected(
            f"$b wget -q -O - http://10.0.2.2:{port}/page;"
            f"$b wget -q -O - http://127.0.0.1:{port}/page;"
            "$b ip -o link; $b ip -o addr; $b ip route"
        )
        # Addresses of proxies are often those of the loopback.
        self.assertEqual((seen.lines[:2], seen.code), (["fetched"] * 2, 0), seen.text)
        (lo,) = [line for line in seen.lines if line.startswith("1: lo: ")]
        self.assertIn("<LOOPBACK>", lo)
        self.assertIn("10.0.2.100/24", seen.text)
        if os.path.exists("/proc/net/if_inet6"):
            self.assertIn("fe80::80/64", seen.text)
        self.assertIn("default via 10.0.2.2 dev tap0", seen.text)

    async def test_isolated(self) -> None:
        """X29: nothing of the machine's loopback can be reached; the own one is up."""
        port = self.serve()
        seen = await self.run_connected(
            "".join(
                f"$b wget -q -O - http://{host}:{port}/page || echo refused;"
                for host in ("10.0.2.2", "127.0.0.1")
            )
            + "$b ip -o link; $b cat /proc/sys/net/ipv4/conf/all/route_localnet /etc/hosts",
            isolated=True,
        )
        self.assertEqual(seen.lines.count("refused"), 2, seen.text)
        self.assertIn("lo: <LOOPBACK,UP", seen.text)
        self.assertIn("tap0: <BROADCAST,MULTICAST,UP", seen.text)
        hosts = Path("/etc/hosts").read_text("utf-8")
        self.assertTrue(seen.text.endswith("0\n" + hosts), seen.text)

    async def test_files(self) -> None:
        """X29: the files of the network."""
        seen = await self.run_connected(
            "cd /etc; $b ls -A; $b stat -c %a hosts resolv.conf; $b cat resolv.conf; echo;"
            "$b cat /proc/sys/net/ipv4/conf/all/route_localnet"
        )
        names = [name for name in ("nsswitch.conf", "services") if os.path.exists("/etc/" + name)]
        expected = sorted(["group", "hosts", "passwd", "resolv.conf", *names])
        self.assertEqual(seen.lines, [*expected, "644", "644", "nameserver 10.0.2.3", "1"])

    async def test_builder(self) -> None:
        """X12, X30: the builder has no other descriptor, no socket of the machine, no right."""
        abstract = socket.socket(socket.AF_UNIX)
        with abstract:
            abstract.bind(f"\0guixd-test-{os.getpid()}".encode())
            seen = await self.run_connected(
                "f=$NIX_BUILD_TOP/fd; ($b ls /proc/1/fd > $f); $b tr '\\n' ' ' < $f; echo;"
                "$b cat /proc/net/unix; $b readlink /proc/self/ns/net; cd /proc; echo [0-9]*;"
                "$b ip link set tap0 down || echo refused; $b ls -A /dev"
            )
        self.assertEqual(seen.lines[0], "0 1 2 ")
        self.assertNotIn("guixd-test", seen.text)
        self.assertNotIn(os.readlink("/proc/self/ns/net"), seen.lines)
        self.assertIn("1", seen.lines)
        self.assertIn("refused", seen.lines)
        self.assertNotIn("net", seen.lines)

    async def test_mover(self) -> None:
        """X29, X33: who moves packets: never root, with namespaces of its own, and few files."""
        process, recorder, moving = await self.spawn_waiting()
        there = f"/proc/{moving}"
        status = dict(
            line.split(":\t", 1) for line in Path(there, "status").read_text().splitlines()
        )
        self.assertEqual(status["Uid"].split(), [str(self.uid)] * 4)
        self.assertNotEqual(self.uid, 0)
        for name in "CapEff", "CapPrm", "CapInh", "CapAmb":
            self.assertEqual(int(status[name], 16), 0)
        self.assertEqual((status["NoNewPrivs"], status["Seccomp"]), ("1", "2"))
        if self.mode == "users":
            self.assertEqual(status["Groups"].split(), [])
        ours = {name for name in _SPACES if os.readlink(f"/proc/self/ns/{name}")
                != os.readlink(f"{there}/ns/{name}")}  # fmt: skip
        self.assertEqual(ours, self.own_spaces)
        builders = {name for name in _SPACES if os.readlink(f"/proc/{process.pid}/ns/{name}")
                    == os.readlink(f"{there}/ns/{name}")}  # fmt: skip
        self.assertEqual(builders, set(_SPACES) - {"net"} - self.own_spaces)
        root = Path(there, "root")
        inside = set(os.listdir(root))
        self.assertLessEqual({"usr", "etc", "proc"}, inside)
        self.assertFalse({"root", "home", "run", "var", "sys"} & inside)
        self.assertLessEqual(set(os.listdir(root / "etc")), {"hosts", "resolv.conf", "ld.so.cache"})
        for line in Path(there, "mountinfo").read_text().splitlines():
            place, options = line.split()[4:6]
            self.assertTrue(place == "/proc" or "ro" in options.split(","), line)
        links = {int(n): os.readlink(f"{there}/fd/{n}") for n in os.listdir(f"{there}/fd")}
        self.assertEqual(links.pop(0), "/dev/null")
        self.assertEqual(links.pop(1), links.pop(2))
        links.pop(6)
        self.assertEqual(os.stat(f"{there}/fd/6").st_rdev, os.stat(DEVICE).st_rdev)
        rest = {link.partition(":")[0] for link in links.values()}
        self.assertLessEqual(rest, {"socket"}, links)
        process.signalProcess("KILL")
        await recorder.ended

    async def test_hostile_mover(self) -> None:
        """X33, CVE-2025-46416: who moves packets gets at nothing else, should it be taken over."""
        require(os.path.exists("/usr/bin/python3"), "/usr/bin/python3")
        directory = Path(temporary_directory(self, world_readable=True))
        script(directory, _HOSTILE)
        with socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind(f"\0guixd-test-{os.getpid()}".encode())
            abstract.listen()
            with capturedLogs() as events, self.assertRaises(SandboxError):
                await self.place.spawn(self.spec("true", path=str(directory)))
        (told,) = [event["text"] for event in events if "text" in event]
        results = dict(line.split(": ", 1) for line in told.splitlines())
        self.assertEqual(results.pop("processes"), "1")
        self.assertEqual(results.pop("descriptors"), "0 1 2 5 6")
        self.assertEqual(results.pop("internet"), "possible")
        self.assertEqual(results.pop("abstract names"), "seen")  # but they cannot be used
        self.assertEqual(len(results), 9)
        self.assertNotIn("possible", results.values(), results)

    async def test_ends_together(self) -> None:
        """X34: who moves packets ends with the builder, however that ends, and first."""
        for text in "echo go; $b sleep 1000", "echo go; $b true", "echo go; exit 3":
            process, recorder = await self.place.spawn(self.spec(text))
            zygote = self.place.launcher.zygote_pid
            await recorder.hear(b"go")
            if "sleep" in text:
                process.signalProcess("KILL")
            reason = await recorder.ended
            self.assertEqual(builders_of(zygote), [])
            self.assertEqual(getattr(reason, "exitCode", 0), {"3": 3, "e": 0}.get(text[-1]))
            self.assertEqual(recorder.output, b"go\n")
        before = descriptors_of(zygote)
        spawning = self.place.launcher.spawn(None, self.spec("$b sleep 1000"))
        spawning.cancel()
        with self.assertRaises(CancelledError):
            await spawning
        self.assertEqual(builders_of(zygote), [])
        self.assertEqual(descriptors_of(zygote), before)

    async def test_mover_dies(self) -> None:
        """X29: a builder whose network breaks down is ended, and told why; others go on."""
        _, recorder, moving = await self.spawn_waiting()
        other, others = await self.place.spawn(self.spec("echo up; $b sleep 1000"))
        await others.hear(b"up")
        os.kill(moving, signal.SIGKILL)
        reason = await recorder.ended
        self.assertEqual(reason.signal, signal.SIGKILL)
        self.assertIn(b"the network of this build has broken down", recorder.output)
        self.assertEqual(len(builders_of(self.place.launcher.zygote_pid)), 2)
        other.signalProcess("KILL")
        await others.ended
        self.assertEqual(others.output, b"up\n")

    async def test_not_usable(self) -> None:
        """X28: programs that do not become ready are told apart; nothing is left of them."""
        assert isinstance(self, TestCase)
        never = ("#!/bin/sh\nexec sleep 1000\n", "#!/bin/sh\nexec yes\n")
        for text in "#!/bin/sh\n", "#!/bin/sh\nprintf 0 >&5\nexec sleep 1000\n", "#!/no\n", *never:
            directory = temporary_directory(self, world_readable=True)
            script(Path(directory), text)
            spec = self.spec("echo x", path=directory)
            assert spec.uplink is not None
            patience = 0.1 if text in never else 30
            spec = replace(spec, uplink=replace(spec.uplink, patience=patience))
            with self.assertRaises(SandboxError) as caught:
                await self.place.launcher.spawn(None, spec)
            self.assertEqual(caught.exception.phase, "network")
            self.assertIn("1.3.0", caught.exception.text)
            self.assertEqual(builders_of(self.place.launcher.zygote_pid), [])
        seen = await self.run_connected("$b ip -o link show tap0")
        self.assertEqual(seen.code, 0, seen.text)

    async def test_launcher_stops(self) -> None:
        """X34: a launcher that stops ends both."""
        _, recorder, moving = await self.spawn_waiting()
        pidfd = os.pidfd_open(moving)
        await self.place.launcher.stop()
        self.addCleanup(os.close, pidfd)
        await recorder.ended
        self.assertTrue(select.select([pidfd], [], [], 60)[0])

    async def test_zygote_dies(self) -> None:
        """X34: without the zygote neither lives."""
        _, recorder, moving = await self.spawn_waiting()
        pidfd = os.pidfd_open(moving)
        os.kill(self.place.launcher.zygote_pid, signal.SIGKILL)
        await recorder.ended
        self.addCleanup(os.close, pidfd)
        self.assertTrue(select.select([pidfd], [], [], 60)[0])
        self.flushLoggedErrors()


@requires_slirp
class BuildUserTests(_Connected, TestCase):
    """With a build user."""

    mode = "users"
    own_spaces = {"ipc", "mnt", "pid", "uts"}

    @property
    def uid(self) -> int:
        assert self.place.user is not None
        return self.place.user.uid

    async def test_names(self) -> None:
        """X29: the name server of a build asks that of the machine."""
        resolver = temporary_directory(self, world_readable=True) + "/resolv.conf"
        Path(resolver).write_text("nameserver 127.0.0.1\n")
        machine = _OTHER_MACHINE.format(resolver=resolver)
        boot = guixd.build.zygote._BOOT.replace("main(int", machine + "main(int", 1)
        self.patch(guixd.build.zygote, "_BOOT", boot)
        await self.place.run("true")
        names = Names()
        with name_socket(self.place.launcher.zygote_pid) as server:
            port = reactor.adoptDatagramPort(server.fileno(), socket.AF_INET, names)
        self.addCleanup(port.stopListening)
        seen = await self.run_connected("$b nslookup probe.example")
        self.assertIn("203.0.113.7", seen.text)
        self.assertIn("10.0.2.3", seen.text)
        self.assertIn(b"probe\x07example", names.asked)

    async def test_group(self) -> None:
        """X29: who moves the packets of a build has a part in its limits."""
        top = control_groups()
        require(bool(top), "root and cgroup v2")
        group = Path(top, f"guixd-test-{os.getpid()}")
        group.mkdir()
        self.addCleanup(group.rmdir)
        spec = replace(self.spec("echo go; $b sleep 1000"), cgroup=str(group))
        process, recorder = await self.place.spawn(spec)
        await recorder.hear(b"go")
        both = builders_of(self.place.launcher.zygote_pid)
        members = [int(line) for line in Path(group, "cgroup.procs").read_text().splitlines()]
        self.assertEqual(len(both), 2)
        self.assertLessEqual(set(both), set(members))
        process.signalProcess("KILL")
        await recorder.ended
        self.assertEqual(Path(group, "cgroup.procs").read_text(), "")


@requires_slirp
@requires_user_namespaces
class RootlessTests(_Connected, TestCase):
    """With a user namespace."""

    mode = "rootless"
    own_spaces = {"ipc", "mnt", "pid", "user", "uts"}

    @property
    def uid(self) -> int:
        return self.place.host.uid

    async def test_no_device(self) -> None:
        """X28: a device that is not for everybody is no network."""
        os.chmod(self.node, 0o600)
        with self.assertRaises(SandboxError) as caught:
            await self.place.spawn(self.spec("true"))
        self.assertEqual(caught.exception.phase, "network")
        self.assertIn(f"Permission denied: {DEVICE}", caught.exception.text)
        self.assertEqual(builders_of(self.place.launcher.zygote_pid), [])
