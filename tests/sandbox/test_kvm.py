"""The group `kvm` in user namespaces, by the help of newgidmap."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from twisted.trial.unittest import TestCase

import guixd.build.zygote
from tests.sandbox.place import BUILD_GID, Place
from tests.support import is_root, requires, requires_user_namespaces

KVM = 64_123
_BOOT = (
    "import sys, os; sys.path[:] = sys.argv[2:]; "
    "from guixd.sandbox import kernel; from guixd.sandbox.zygote import main; import prctl; "
    "kernel.unshare(kernel.NEWNS); "
    "kernel.mount('none', '/', flags=kernel.MS_REC | kernel.MS_PRIVATE); "
    "[kernel.mount('{etc}/' + name, '/etc/' + name, flags=kernel.MS_BIND) "
    "for name in ('passwd', 'subgid')]; "
    "os.setgroups([{kvm}]); os.setresgid(*[{gid}] * 3); os.setresuid(*[{uid}] * 3); "
    "prctl.set_dumpable(1); main(int(sys.argv[1]))"
)
"""Starts a zygote as a member of the group, in an /etc of its own."""


def _can_map() -> bool:
    return is_root() and shutil.which("newgidmap") is not None and os.path.exists("/etc/subgid")


@requires(_can_map, "root, newgidmap and /etc/subgid")
@requires_user_namespaces
class KvmTests(TestCase):
    """X31: who is in the host's group is in group 40000 of the build, if the host permits that."""

    async def groups(self, subgid: str) -> list[str]:
        """Return what a builder sees of its groups, and of a file of the group.

        :param subgid: what /etc/subgid has, with the daemon's user for USER.
        """
        place = Place(self, "rootless")
        uid, etc = place.host.uid, Path(place.directory, "etc")
        etc.mkdir()
        (etc / "passwd").write_text(f"guixd-test:x:{uid}:{BUILD_GID}::/:/bin/sh\n")
        (etc / "subgid").write_text(subgid.replace("USER", "guixd-test"))
        boot = _BOOT.format(etc=etc, kvm=KVM, gid=BUILD_GID, uid=uid)
        self.patch(guixd.build.zygote, "_BOOT", boot)
        place.host = replace(place.host, kvm_gid=KVM)
        device = Path(place.directory, "device")
        device.write_text("it opens\n")
        device.chmod(0o040)
        os.chown(device, 0, KVM)
        shown = ((str(device), str(device)),)
        place.settings = replace(place.settings, chroot_directories=shown)
        seen = await place.run(
            f"cd /proc/self; $b cat gid_map setgroups; $b id -G; $b stat -c %g {device};"
            f" $b cat {device} 2>&1"
        )
        return [" ".join(line.split()) for line in seen.lines]

    async def test_mapped(self) -> None:
        """X31: group 40000 is there, and opens what the group may open."""
        *maps, setgroups, groups, owner, contents = await self.groups(f"USER:{KVM}:1\n")
        self.assertEqual(maps, ["30000 30000 1", "40000 40000 1"])
        self.assertEqual(setgroups, "deny")
        self.assertEqual((groups, owner, contents), ("30000 40000", "40000", "it opens"))

    async def test_not_permitted(self) -> None:
        """X31: where the host does not permit it, the build goes on without the group."""
        *maps, setgroups, groups, owner, contents = await self.groups("")
        self.assertEqual((maps, setgroups), (["30000 30000 1"], "deny"))
        self.assertEqual((groups, owner), ("30000 65534", "65534"))
        self.assertEqual(contents, "it opens")
