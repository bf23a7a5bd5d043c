"""What a new process does for one build, as a list of calls with ready arguments.

For a process that has been forked ahead and shall do little itself: names are bytes and
the directories to make are known.  Carried out by `guixd.sandbox.phases`.
"""

from __future__ import annotations

import marshal
from functools import lru_cache
from typing import Any

from guixd.sandbox import kernel
from guixd.sandbox.spec import Base, File, SandboxSpec

NETWORK = "network"
"""The phase in which a build gets its network; a build can do without."""
_NEWCGROUP = 0x02000000
_KINDS = {"/proc": "proc", "/dev/shm": "tmpfs"}
Step = tuple[str, str, tuple[Any, ...]]
"""The name of a phase, a name in `guixd.sandbox.phases.CALLS`, and its arguments."""


def prepare(number: int, spec: SandboxSpec) -> bytes:
    """Return the program of the build NUMBER, marshalled for the same Python."""
    steps = _plain(spec) if spec.base is None else _container(spec, spec.base)
    if spec.cgroup:
        steps[:0] = [
            ("control group", "write_file", (f"{spec.cgroup}/cgroup.procs", "0")),
            # So that the builder does not see where in the tree it is.
            ("control group", "unshare", (_NEWCGROUP,)),
        ]
    environment = {_bytes(name): _bytes(value) for name, value in spec.environment}
    arguments = [_bytes(argument) for argument in spec.arguments]
    names = str(spec.program), str(spec.store)
    texts = str(spec.unsupported_platform), str(spec.foreign_platform)
    started = b'["started", %d, %%b]' % number
    return marshal.dumps((number, steps, started, (*names, arguments, environment, *texts)))


def _plain(spec: SandboxSpec) -> list[Step]:
    steps: list[Step] = [
        ("working directory", "chdir", (_bytes(spec.directory),)),
        ("personality", "set_personality", (spec.personality,)),
    ]
    if spec.user_namespace is not None:
        steps.append(("locked mounts", "lock_mounts", (spec.user_namespace.uid,)))
    if spec.ids is not None:
        ids = spec.ids.uid, spec.ids.gid, tuple(spec.ids.groups)
        steps.append(("identity", "set_ids", ids))
    return [*steps, ("parent's death", "die_with_zygote", ())]


def _container(spec: SandboxSpec, base: Base) -> list[Step]:
    """Return the phases of a container (spec: sandbox §6) that depend on SPEC, in their order."""
    tree = _Tree()
    if not spec.loopback:  # Another network, whose `lo` is down.
        tree.add("loopback", "unshare", kernel.NEWNET)
    if spec.uplink is not None:
        uplink = spec.uplink
        tree.add(NETWORK, "offer_tap", uplink.ipv6, uplink.localnet, uplink.patience)
    if spec.filter:  # What has not been done for a process that keeps the network.
        tree.add("namespaces", "unshare", kernel.NEWNS | kernel.NEWIPC | kernel.NEWUTS)
        tree.enter(base, ",size=1m")
    tree.add_all(spec)
    tree.add("pivot root", "pivot")
    if not spec.filter:
        return tree.steps + _plain(spec)
    flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY
    tree.add("pivot root", "mount", b"none", b"/", "", flags)
    last: list[Step] = [
        (NETWORK, "take_tap", ()),
        ("system call filter", "install_filter", (spec.filter,)),
    ]
    return tree.steps + _plain(spec) + last


@lru_cache(maxsize=4)
def beginning(base: Base) -> bytes:
    """Return the phases of a container with BASE that come before those of any program."""
    tree = _Tree()
    spaces = kernel.NEWNS | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS
    tree.add("namespaces", "unshare", spaces)
    tree.add("loopback", "bring_up_loopback")
    tree.add("host names", "set_host_names", "localhost", "(none)")
    tree.enter(base)
    return marshal.dumps(tree.steps)


class _Tree:
    """Steps, and which directories they make below the root."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._made = {b""}

    def enter(self, base: Base, options: str = "") -> None:
        """Make the root directory, with OPTIONS of tmpfs, and what is in it in any case."""
        # Fails in a process whose root is no mount point, such as below chroot(1).
        private = kernel.MS_REC | kernel.MS_PRIVATE
        self.add("private mounts", "mount", b"none", b"/", "", private)
        root, phase = _bytes(base.root), "root directory"
        options = "mode=755" + ("" if base.gid is None else f",gid={base.gid}") + options
        self.add(phase, "mount", b"guixd", root, "tmpfs", 0, options)
        self.add(phase, "chdir", root)
        self.add_all(base)

    def add_all(self, what: Base | SandboxSpec) -> None:
        """Make the files and mounts of WHAT."""
        for file in what.files:
            self.add_file("files", file)
        for bind in what.binds:
            target = self.add_parents("bind mounts", bind.target)
            source = _bytes(bind.source)
            self.add("bind mounts", "bind", source, target, bind.read_only, bind.optional)
        for name in what.mounts:
            self.add_mount(f"mount {name}", name)

    def add(self, phase: str, call: str, *arguments: Any) -> None:
        self.steps.append((phase, call, arguments))

    def add_parents(self, phase: str, name: str) -> bytes:
        """Make the directories that NAME needs; return it as a name below the root."""
        path = _bytes(name).lstrip(b"/") or b"."
        parent = path.rpartition(b"/")[0]
        missing: list[bytes] = []
        while parent not in self._made:
            missing.append(parent)
            parent = parent.rpartition(b"/")[0]
        for parent in reversed(missing):
            self.add(phase, "make_directory", parent)
        self._made.update(missing)
        return path

    def add_mount(self, phase: str, name: str) -> None:
        """Mount a file system of the kernel."""
        path = self.add_parents(phase, name + "/")[:-1]
        if name == "/dev/pts":
            self.add(phase, "mount_pts")
        else:
            self.add(phase, "mount", b"none", path, _KINDS[name])

    def add_file(self, phase: str, file: File) -> None:
        """Make FILE."""
        path = self.add_parents(phase, file.path)
        if file.kind == "symlink":
            self.add(phase, "symlink", _bytes(file.content), path)
            return
        exact = file.mode & ~0o1777 == 0  # No more is kept when something is made.
        if file.kind == "file":
            self.add(phase, "make_file", path, file.mode, _bytes(file.content))
        elif path in self._made:
            exact = False
        else:
            self.add(phase, "make_directory", path, file.mode)
            self._made.add(path)
        if not exact:
            self.add(phase, "chmod", path, file.mode)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
