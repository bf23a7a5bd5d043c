"""What a builder sees in its container, item by item."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from guixd.build import container
from guixd.build.leftovers import RUNNING
from guixd.errors import SandboxError
from tests.sandbox.place import BUILD_GID, Outcome, Place, free_uid
from tests.support import requires_root, requires_user_namespaces, temporary_directory

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
NEW = {"ipc", "mnt", "net", "pid", "uts"}
DEVICES = ["full", "null", "random", "tty", "urandom", "zero"]


class _InContainer:
    """Tests that hold with build users and without."""

    mode = ""
    uid = 0
    gid = 0
    owner = ""
    new_namespaces: set[str] = set()

    def setUp(self) -> None:
        assert isinstance(self, TestCase)
        self.place = Place(self, self.mode)

    def run_script(self, script: str, **options: object) -> Deferred[Outcome]:
        return Deferred.fromCoroutine(self.place.run(script, **options))

    async def test_root(self) -> None:
        """X1, X2, X6: the root directory, and no item that is not an input."""
        os.mkdir(self.place.item("other"))
        seen = await self.place.run(
            f"$b ls -A /; $b stat -c '%a %u:%g' /; cd {self.place.store.path}; echo *;"
            f"$b stat -c %a .; $b ls {self.place.item('other')} || echo missing;"
            "$b mkdir /x || echo refused"
        )
        first = self.place.directory.split("/")[1]
        expected = sorted({"dev", "etc", "proc", "tmp", first})
        self.assertEqual(seen.lines[: len(expected)], expected)
        rest = seen.lines[len(expected) :]
        self.assertEqual(rest[0], f"555 {self.owner}")
        self.assertEqual(rest[1:3], [self.place.busybox.base, "1775"])
        self.assertIn("missing", rest)
        self.assertIn("refused", rest)

    async def test_etc(self) -> None:
        """X3: the files of /etc."""
        seen = await self.place.run(
            "cd /etc; for f in *; do echo $f; $b cat $f; $b stat -c %a $f; done"
        )
        self.assertEqual(
            seen.text,
            f"group\nnixbld:!:{self.gid}:\n644\n"
            "hosts\n127.0.0.1 localhost\n::1 localhost\n644\n"
            f"passwd\nnixbld:x:{self.uid}:{self.gid}:Nix build user:/:/noshell\n"
            "nobody:x:65534:65534:Nobody:/:/noshell\n644\n",
        )

    async def test_dev(self) -> None:
        """X4: the devices, that they work, and that there is no terminal."""
        seen = await self.place.run(
            "$b ls -A /dev; for l in fd stdin stdout stderr ptmx; do $b readlink /dev/$l; done;"
            "$b stat -c %a /dev/shm /dev/pts/ptmx; echo a > /dev/shm/a; echo b > /dev/null;"
            "$b head -c 3 /dev/zero | $b wc -c; $b head -c 5 /dev/urandom | $b wc -c;"
            "(: < /dev/tty) 2>&1; echo x > /dev/full"
        )
        kvm = ["kvm"] if os.path.exists("/dev/kvm") else []
        listing = sorted(["fd", "ptmx", "pts", "shm", "stderr", "stdin", "stdout"] + DEVICES + kvm)
        self.assertEqual(seen.lines[: len(listing)], listing)
        rest = seen.lines[len(listing) :]
        self.assertEqual(
            rest[:5],
            ["/proc/self/fd", *(f"/proc/self/fd/{n}" for n in range(3)), "/dev/pts/ptmx"],
        )
        self.assertEqual(rest[5:9], ["1777", "666", "3", "5"])
        self.assertIn("No such device or address", rest[9])
        self.assertIn("No space left", rest[10])

    async def test_inputs(self) -> None:
        """X5, X7: inputs cannot be changed; a link is an input too."""
        link = self.place.item("link")
        os.symlink("anywhere", link)
        script = (
            f"for f in {self.place.busybox} {self.place.busybox}/busybox; do"
            " $b touch $f; $b chmod 777 $f; $b rm -rf $f; done;"
            f"echo x > {self.place.busybox}/new; $b readlink {link}; echo > {link}x && echo new"
        )
        build = self.place.prepare(self.place.derivation(script), inputs=(link,))
        seen = await self.place.finish(build.spec)
        refused = [line for line in seen.lines if "Read-only file system" in line]
        self.assertGreaterEqual(len(refused), 6, seen.text)
        self.assertIn("anywhere", seen.lines)
        self.assertEqual(seen.lines[-1], "new")
        self.assertEqual(os.listdir(self.place.busybox), ["busybox"])

    async def test_names_and_network(self) -> None:
        """X8, X9, X30: host names, one interface that is up, nobody else to talk to."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        abstract = socket.socket(socket.AF_UNIX)
        self.addCleanup(abstract.close)
        abstract.bind(f"\0guixd-test-{os.getpid()}".encode())
        seen = await self.place.run(
            "$b hostname; $b cat /proc/sys/kernel/domainname; $b ip -o addr;"
            f"$b nc -w 1 127.0.0.1 {listener.getsockname()[1]} < /dev/null || echo refused;"
            "$b cat /proc/net/unix; $b ip route"
        )
        self.assertEqual(seen.lines[:2], ["localhost", "(none)"])
        addresses = [line.split()[1:4] for line in seen.lines if "inet" in line]
        self.assertEqual(addresses, [["lo", "inet", "127.0.0.1/8"], ["lo", "inet6", "::1/128"]])
        self.assertEqual(seen.lines[-2], "refused")
        self.assertNotIn("guixd-test", seen.text)

    async def test_namespaces(self) -> None:
        """X10: which namespaces are the daemon's."""
        seen = await self.place.run(
            f"for n in {' '.join(NAMESPACES)}; do $b readlink /proc/self/ns/$n; done"
        )
        same = {name for name in NAMESPACES if os.readlink(f"/proc/self/ns/{name}") in seen.lines}
        self.assertEqual(len(seen.lines), len(NAMESPACES))
        self.assertEqual(set(NAMESPACES) - same, self.new_namespaces)

    async def test_process(self) -> None:
        """X11, X12, X13, X14, X16: the process itself."""
        seen = await self.place.run(
            "echo $$ $PPID; $b cut -d ' ' -f 4-7 /proc/1/stat; cd /proc; echo [0-9]*; umask;"
            "f=$NIX_BUILD_TOP/fd; ($b ls /proc/1/fd > $f); $b tr '\\n' ' ' < $f; echo;"
            "$b readlink /proc/1/fd/0;"
            "$b cat /proc/self/personality /proc/self/oom_score_adj;"
            "[ $($b readlink /proc/1/fd/1) = $($b readlink /proc/1/fd/2) ] && echo one;"
            "echo x >&0 && echo writable; $b readlink /proc/1/fd/1"
        )
        self.assertEqual(seen.lines[:2], ["1 0", "0 1 1 0"])
        self.assertEqual(
            seen.lines[2:-1],
            ["1", "0022", "0 1 2 ", "/dev/null", "00040000", "1000", "one", "writable"],
        )
        self.assertRegex(seen.lines[-1], r"^pipe:\[\d+\]$")

    async def test_status(self) -> None:
        """X15, X16: ids, capabilities, signals, and no filter."""
        build = self.place.prepare(self.place.derivation(""))
        arguments = ("busybox", "cat", "/proc/self/status", "/proc/self/limits")
        seen = await self.place.finish(replace(build.spec, arguments=arguments))
        status = dict(line.split(":\t") for line in seen.lines if ":\t" in line)
        self.assertEqual(status["Uid"].split(), [str(self.uid)] * 4)
        self.assertEqual(status["Gid"].split(), [str(self.gid)] * 4)
        groups = [str(self.gid)] if self.mode == "users" else []
        self.assertEqual(status["Groups"].split(), groups)
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", "SigBlk"):
            self.assertEqual(int(status[name], 16), 0, name)
        # 32 and 33 are the C library's own: programs cannot set them, and make leaves them so.
        self.assertEqual(int(status["SigIgn"], 16) & ~(0b11 << 31), 0)
        self.assertEqual((status["NoNewPrivs"], status["Seccomp"]), ("0", "0"))
        (core,) = [line.split()[4] for line in seen.lines if line.startswith("Max core")]
        self.assertEqual(core, "0")

    async def test_environment(self) -> None:
        """X17: the variables, their order, the arguments and the working directory."""
        derivation = self.place.derivation(
            "$b tr '\\0' '\\n' < /proc/1/environ; $b tr '\\0' '\\n' < /proc/1/cmdline; $b pwd",
            environment={
                "Zed": "é\udcff",
                "PATH": "/mine",
                "TMPDIR": "no",
                "impureEnvVars": "HOME",
            },
        )
        build = self.place.prepare(derivation, cores=3)
        seen = await self.place.finish(build.spec)
        inside = "/tmp/guix-build-probe.drv-0"
        expected = [
            "HOME=/homeless-shelter",
            "NIX_BUILD_CORES=3",
            f"NIX_BUILD_TOP={inside}",
            f"NIX_STORE={self.place.store.path}",
            "PATH=/mine",
            f"PWD={inside}",
            f"TEMP={inside}",
            f"TEMPDIR={inside}",
            f"TMP={inside}",
            f"TMPDIR={inside}",
            "Zed=é\udcff",
            f"b={self.place.busybox}/busybox",
            "impureEnvVars=HOME",
            f"out={self.place.item('probe')}",
            "busybox",
            "sh",
            "-c",
        ]
        self.assertEqual(seen.lines[: len(expected)], expected)
        self.assertEqual(seen.lines[-1], inside)

    async def test_build_directory(self) -> None:
        """X17, X18, X19: another number outside; the tree outside is closed."""
        outside = self.place.directory + "/tmp/guix-build-probe.drv-"
        os.mkdir(outside + "0")
        os.symlink("nowhere", outside + "1")
        build = self.place.prepare(
            self.place.derivation(
                "$b stat -c '%a %u:%g' .; echo > f; $b ls -A /tmp | $b grep -v guixd-test; $b pwd"
            )
        )
        self.assertEqual(build.workspace.outside, outside + "2")
        self.assertEqual(os.stat(outside + "2").st_mode & 0o7777, RUNNING)
        self.assertEqual(os.stat(outside + "2/top").st_mode & 0o7777, 0o700)
        seen = await self.place.finish(build.spec)
        inside = "guix-build-probe.drv-0"
        self.assertEqual(seen.lines, [f"700 {self.uid}:{self.gid}", inside, "/tmp/" + inside])
        self.assertEqual(os.listdir(outside + "2/top"), ["f"])

    async def test_background(self) -> None:
        """X21, X24: what is left running holds nothing up, and dies."""
        uid = self.place.user.uid if self.place.user else self.place.host.uid
        seen = await self.place.run("$b setsid $b sleep 1000 & $b sleep 1001 & echo done")
        self.assertEqual((seen.lines, seen.code), (["done"], 0))
        self.assertEqual(_sleepers(uid), [])

    async def test_chroot_directory(self) -> None:
        """X26: directories of the administrator; those of the store are read-only."""
        there = temporary_directory(self, world_readable=True)
        os.chmod(there, 0o777)
        places = (("/a", there), ("/b/c", self.place.busybox))
        self.place.settings = replace(self.place.settings, chroot_directories=places)
        seen = await self.place.run("echo x > /a/file; echo y > /b/c/file; $b ls /b/c")
        self.assertIn("Read-only file system", seen.lines[0])
        self.assertEqual(seen.lines[1:], ["busybox"])
        self.assertEqual(os.listdir(there), ["file"])

    async def test_own_dev(self) -> None:
        """X27: who maps /dev gets his own."""
        there = temporary_directory(self, world_readable=True)
        os.mkdir(there + "/shm")
        self.place.settings = replace(self.place.settings, chroot_directories=(("/dev", there),))
        build = self.place.prepare(self.place.derivation("$b ls -A /dev"))
        seen = await self.place.finish(build.spec)
        self.assertEqual(seen.lines, ["shm"])

    async def test_fixed_output(self) -> None:
        """X28: a build with a fixed output has the host's files, and no network."""
        names = ("hosts", "nsswitch.conf", "resolv.conf", "services")  # a host need not have all
        files = [Path("/etc", name) for name in names if os.path.exists("/etc/" + name)]
        script = "$b ls -A /etc; $b ip -o link; echo the files; "
        seen = await self.place.run(script + "".join(f"$b cat {f}; " for f in files), fixed=True)
        expected = sorted(["group", "passwd"] + [file.name for file in files])
        self.assertEqual(seen.lines[: len(expected)], expected)
        self.assertIn("lo: <LOOPBACK> ", seen.lines[len(expected)])
        contents = "".join(file.read_text(encoding="utf-8") for file in files)
        self.assertTrue(seen.text.endswith("the files\n" + contents))

    async def test_fixed_output_isolated(self) -> None:
        """X29: with an isolated host the loopback interface is up."""
        self.place.settings = replace(self.place.settings, isolate_host_loopback=True)
        seen = await self.place.run("$b ip -o link", fixed=True)
        self.assertIn("LOOPBACK,UP", seen.text)

    async def test_phase(self) -> None:
        """X25: a failure names its phase, and leaves no process."""
        build = self.place.prepare(
            self.place.derivation("true"), inputs=(self.place.item("missing"),)
        )
        with self.assertRaises(SandboxError) as caught:
            await self.place.spawn(build.spec)
        self.assertEqual(caught.exception.phase, "bind mounts")
        self.assertIn(self.place.item("missing"), caught.exception.text)

    async def test_many_inputs(self) -> None:
        """X5: a plan that fills no packet arrives as well."""
        environment = {f"variable{n}": "x" * 1000 for n in range(200)}
        seen = await self.place.run("echo ${#variable199}", environment=environment)
        self.assertEqual(seen.lines, ["1000"])

    async def test_uname(self) -> None:
        """X13: the personality of 32-bit builds."""
        build = self.place.prepare(self.place.derivation("$b cat /proc/self/personality"))
        spec = replace(build.spec, personality=0x0040008)
        self.assertEqual((await self.place.finish(spec)).lines, ["00040008"])


def _sleepers(uid: int) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            status = Path(f"/proc/{pid}/status").read_bytes()
        except OSError:
            continue
        ids = status.partition(b"\nUid:")[2].split()[:1]
        if b"sleep" in command and ids == [b"%d" % uid]:
            found.append(pid)
    return found


@requires_root
class BuildUserTests(_InContainer, TestCase):
    """With a build user."""

    mode = "users"
    uid = free_uid()
    gid = BUILD_GID
    owner = f"0:{BUILD_GID}"
    new_namespaces = NEW

    async def test_owners(self) -> None:
        """X2: the builder owns nothing outside its build directory."""
        seen = await self.place.run(
            "$b stat -c '%u:%g %a' /etc /dev /tmp $NIX_STORE $b;"
            "$b touch /etc/x || echo 1; $b mv /tmp /tmp2 || echo 2; $b chmod 755 / || echo 3"
        )
        self.assertEqual(
            seen.lines[:5],
            ["0:0 755", "0:0 755", "0:0 1777", f"0:{BUILD_GID} 1775", "0:0 755"],
        )
        self.assertEqual([line for line in seen.lines if len(line) == 1], ["1", "2", "3"])

    async def test_privileges(self) -> None:
        """X15: nothing that needs privileges."""
        seen = await self.place.run(
            "$b hostname x || echo 1; $b mount -t tmpfs x /tmp || echo 2;$b chroot / true || echo 3"
        )
        self.assertEqual([line for line in seen.lines if len(line) == 1], ["1", "2", "3"])


@requires_user_namespaces
class RootlessTests(_InContainer, TestCase):
    """With a user namespace."""

    mode = "rootless"
    uid = container.GUEST_UID
    gid = container.GUEST_GID
    owner = f"{uid}:{gid}"
    new_namespaces = NEW | {"user"}

    async def test_maps(self) -> None:
        """X31: ids, and no other groups."""
        seen = await self.place.run("cd /proc/self; $b cat uid_map gid_map setgroups")
        words = [line.split() for line in seen.lines]
        self.assertEqual(words, [["30001", "30001", "1"], ["30000", "30000", "1"], ["deny"]])

    async def test_locked_mounts(self) -> None:
        """X31: mounts can neither be undone nor made writable, by whatever namespace."""
        seen = await self.place.run(
            "$b unshare -U -r -m $b sh -c '"
            f"$b mount -o remount,bind,rw {self.place.busybox} && echo writable;"
            "$b umount /proc && echo unmounted; echo tried'"
        )
        self.assertEqual(seen.lines[-1], "tried")
        self.assertNotIn("writable", seen.lines)
        self.assertNotIn("unmounted", seen.lines)


@requires_root
class WithoutNamespacesTests(TestCase):
    """An unprivileged daemon where nobody may make user namespaces."""

    async def test_refused(self) -> None:
        """X25: it is told which of the kernel's settings forbid that."""
        place = Place(self, "rootless")
        uid, gid = place.host.uid, place.host.gid
        boot = (
            "import sys, os; sys.path[:] = sys.argv[2:];"
            "from guixd.sandbox.zygote import main, kernel, phases; import prctl;"
            f"os.setgroups(()); os.setresgid(*[{gid}] * 3); os.setresuid(*[{uid}] * 3);"
            "prctl.set_dumpable(1); kernel.unshare(kernel.NEWUSER);"
            f"phases.write_maps('self', '{uid} {uid} 1', '{gid} {gid} 1');"
            "kernel.write_file('/proc/sys/user/max_user_namespaces', '0');"
            "main(int(sys.argv[1]))"
        )
        self.patch(__import__("guixd.build.zygote").build.zygote, "_BOOT", boot)
        with self.assertRaises(SandboxError) as caught:
            await place.run("true")
        self.assertIn("'user.max_user_namespaces'", caught.exception.text)


class PlainTests(TestCase):
    """Without a container."""

    def setUp(self) -> None:
        self.place = Place(self, "plain")

    async def test_process(self) -> None:
        """X11, X12, X16: session, descriptors, ids and directory."""
        build = self.place.prepare(
            self.place.derivation(
                "$b cut -d ' ' -f 1,5,6 /proc/$$/stat;"
                "f=$NIX_BUILD_TOP/fd; ($b ls /proc/$$/fd > $f); $b tr '\\n' ' ' < $f; echo;"
                "$b pwd; $b id -u; $b id -G; umask; $b cat /proc/self/oom_score_adj; echo $TMPDIR"
            )
        )
        seen = await self.place.finish(build.spec)
        uid = self.place.user.uid if self.place.user else os.geteuid()
        groups = self.place.user.groups if self.place.user else os.getgroups()
        directory = build.workspace.outside
        self.assertEqual(seen.lines[0], f"{seen.pid} {seen.pid} {seen.pid}")
        self.assertEqual(seen.lines[1:4], ["0 1 2 ", directory, str(uid)])
        self.assertLessEqual(set(map(str, groups)), set(seen.lines[4].split()))
        self.assertEqual(seen.lines[5:], ["0022", "1000", directory])
        self.assertEqual(os.stat(directory).st_mode & 0o7777, 0o700)

    async def test_background(self) -> None:
        """X21: the process group does not outlive the builder."""
        seen = await self.place.run("$b sleep 1002 & $b sleep 1003 & echo done")
        uid = self.place.user.uid if self.place.user else os.geteuid()
        self.assertEqual(seen.lines, ["done"])
        self.assertEqual(_sleepers(uid) if self.place.user else [], [])

    async def test_homeless_shelter(self) -> None:
        """X36: a home directory that should not exist is an error, without a container only."""
        self.patch(container, "HOMELESS", self.place.directory)
        with self.assertRaises(SandboxError):
            await self.place.run("true")


@requires_root
class PlainChrootTests(TestCase):
    """A daemon whose root directory is no mount point."""

    async def test_private_mounts(self) -> None:
        """X35: it is told clearly."""
        place = Place(self, "users")
        jail = place.directory + "/jail"
        for name in ("dev", "proc"):
            os.makedirs(f"{jail}/{name}")
        os.mknod(jail + "/dev/null", 0o20666, os.makedev(1, 3))
        boot = (
            "import sys, os; sys.path[:] = sys.argv[2:];"
            "from guixd.sandbox.zygote import main, kernel;"
            "kernel.unshare(kernel.NEWNS);"
            "kernel.mount('none', '/', '', kernel.MS_REC | kernel.MS_PRIVATE);"
            f"kernel.mount('/proc', '{jail}/proc', '', kernel.MS_BIND | kernel.MS_REC);"
            f"os.chroot('{jail}'); main(int(sys.argv[1]))"
        )
        self.patch(__import__("guixd.build.zygote").build.zygote, "_BOOT", boot)
        with self.assertRaises(SandboxError) as caught:
            await place.run("true")
        self.assertEqual(caught.exception.phase, "private mounts")
        self.assertIn("must be a mount point", caught.exception.text)
        shutil.rmtree(jail)
