"""What failures tell their users: what it was, what to do next, and where to read more."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from errno import EACCES, ENOSPC
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from guixd.build import users, verdicts
from guixd.build.lastwords import LONGEST, MOST_LINES, last_lines
from guixd.build.logs import log_file
from guixd.build.request import BuildMode
from guixd.build.results import result_of
from guixd.errors import BuildError, StoreError
from guixd.formats.path import StorePath
from guixd.store.locks import FileLock
from tests.build.graph import FIRST_UID, Recorder, TestCase, World
from tests.support import requires_root

FOREIGN = "riscv64-linux"


@dataclass
class Kind:
    """A kind of failure.

    :ivar script: of the builder, which says something first.
    :ivar says: what the user must read, in the log or as the error.
    :ivar status: of the request.
    :ivar trace: the line for programs, of the text only its beginning; empty for none.
    :ivar recalls: whether the last lines of the log are repeated.
    """

    script: str
    says: tuple[str, ...]
    status: int = 100
    trace: str = "@ build-failed DRV - 1 builder for `DRV' failed "
    recalls: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    derivation: dict[str, Any] = field(default_factory=dict)


REJECTED = "@ build-failed DRV - 1 "
TIMED_OUT = "@ build-failed DRV - timeout"
KEEP = "`--keep-failed'"

KINDS = {
    "exit": Kind("exit 7", ("failed with exit code 7", KEEP), options={"client_uid": 1}),
    "killed child": Kind("exit 137", ("exit code 137", "out of memory", "`--max-jobs'")),
    "timeout": Kind(
        "while :; do :; done",
        ("timed out after 1 seconds, the limit that the option `--timeout'",),
        101,
        TIMED_OUT,
        options={"timeout": 1},
    ),
    "silence": Kind(
        "sleep 100",
        ("timed out after 1 seconds of silence, the limit that the option `--max-silent-time'",),
        101,
        TIMED_OUT,
        options={"max_silent_time": 1},
    ),
    "long log": Kind(
        "yes",
        ("wrote more than 1000 bytes of log", "`build-max-log-size'"),
        101,
        TIMED_OUT,
        options={"max_log_size": 1000},
    ),
    "no output": Kind(
        "true", ("builder for `DRV' failed to produce output path `OUT'",), 1,
        REJECTED + "builder for `DRV' failed to produce output path `OUT'",
    ),
    "FIFO": Kind("mkfifo $out", ("it is a FIFO, but the store has only",), 1, "", False),
    "writable": Kind(
        "echo > $out; chmod 664 $out",
        ("suspicious ownership or permission", "mode 664", "write permission for no others"), 1,
        REJECTED + "suspicious", False,
    ),
    "reference": Kind(
        "mkdir -p $out/a/b; echo x > $out/a/x; echo $PATH > $out/a/b/it",
        (
            "output `OUT' refers to `SHELL', which `allowedReferences' does not allow",
            "the reference to `SHELL' is in `BASE/a/b/it'",
        ),
        1, REJECTED + "output `OUT' refers", False,
        derivation={"environment": {"allowedReferences": ""}},
    ),
    "requisite": Kind(
        "mkdir $out; ln -s $middle $out/link",
        ("comes by way of `MIDDLE'", "the reference to `MIDDLE' is in `BASE/link'"),
        1, REJECTED + "output `OUT' refers to `SHELL'", False,
    ),
    "cycle": Kind(
        "echo $doc > $out; echo $out > $doc",
        ("cycle detected in the references of `", "it refers to `", ", which refers to `"),
        1, REJECTED + "cycle detected", False, derivation={"outputs": ("out", "doc")},
    ),
    "hash": Kind(
        "printf x > $out",
        (
            "hash mismatch for store item `OUT'",
            "the derivation has to say the actual hash",
        ),
        1, REJECTED + "hash mismatch", False,
        derivation={"fixed": ("sha1", "0" * 40)},
    ),
    "platform": Kind(
        "true", (f"it is for `{FOREIGN}', but", "binfmt_misc"),
        derivation={"platform": FOREIGN, "builder": "TEXT"},
    ),
    "differs": Kind(
        "cat /proc/sys/kernel/random/uuid > $out",
        ("differs from previous round", KEEP),
        1, REJECTED + "output `OUT' of `DRV' differs", False, options={"rounds": 2},
    ),
    "differs, kept": Kind(
        "cat /proc/sys/kernel/random/uuid > $out",
        ("that one is `OUT-check'", "`diffoscope'"),
        1, REJECTED + "output `OUT' of `DRV' differs", False,
        options={"rounds": 2, "keep_failed": True},
    ),
}  # fmt: skip


@requires_root
class KindTests(TestCase):
    """Each kind of failure."""

    timeout = 60

    async def fails(self, world: World, kind: Kind, drv: StorePath, **options: Any) -> Recorder:
        """Let DRV fail in that way."""
        observer = Recorder()
        try:
            await world.build(drv, observer=observer, **{**kind.options, **options})
        except BuildError as error:
            said = "\n".join([*observer.logs, error.text])
            self.assertEqual(error.status, kind.status, said)
        else:
            self.fail("was built")
        names = {"DRV": drv, "OUT": world.output(drv), "SHELL": world.shell}
        names["BASE"] = world.output(drv).base
        if "middle" in world.store.read_derivation(drv).environment:
            names["MIDDLE"] = world.store.read_derivation(drv).environment["middle"]

        def named(text: str) -> str:
            for name, value in names.items():
                text = text.replace(name, value)
            return text

        for part in kind.says:
            self.assertIn(named(part), said)
        ends = [line for line in observer.traces if not line.startswith("@ build-started")]
        if kind.trace:
            self.assertTrue(ends[-1].startswith(named(kind.trace)), ends)
            self.assertNotIn("\n", ends[-1])
        else:
            self.assertEqual(ends, [])
        words = [event[1:] for event in observer.events if event[0] == "words"]
        file = log_file(world.settings.directories.log, drv, "gzip")
        if kind.trace:
            [(lines, named_file)] = words
            self.assertEqual(bool(lines), kind.recalls)
            self.assertEqual(named_file, file)
            self.assertTrue(os.path.exists(file))
        return observer

    async def test_kinds(self) -> None:
        """B2, B11, B13, B14, B20, B23, B25, B26: text, status, trace, and the log's last lines."""
        world = World(self)
        middle = world.derive("middle", "echo $PATH > $out")
        text = world.text("text", "no program")
        for name, kind in KINDS.items():
            more: dict[str, Any] = dict(kind.derivation)
            script = f"echo said by {name.partition(',')[0].replace(' ', '-')}; {kind.script}"
            if name == "requisite":
                more["inputs"] = [middle]
                more["environment"] = {
                    "middle": world.output(middle), "disallowedRequisites": world.shell,
                }  # fmt: skip
            if more.get("builder"):
                more.update(builder=text, sources=[text])
            drv = world.derive(f"a{len(name)}{name[0]}", script, **more)
            await self.fails(world, kind, drv)

    async def test_signal(self) -> None:
        """B2: a builder that was killed; not in a container, where nothing inside can do that."""
        world = World(self, use_chroot=False)
        kind = Kind("", ("failed due to signal 9 (Killed)", "out of memory"))
        await self.fails(world, kind, world.derive("a", "echo said; kill -9 $$"))

    async def test_disk(self) -> None:
        """B36: a builder that fails while the disk is full: how much is free, and what helps."""
        self.patch(verdicts, "DISK_FULL", 1 << 62)
        world = World(self)
        kind = Kind("exit 1", ("iB were free for `", "`guix gc'"), 1)
        await self.fails(world, kind, world.derive("a", "echo said; exit 1"))

    async def test_no_log(self) -> None:
        """B29: when the log cannot be kept, the build goes on and its client is told."""
        world = World(self)
        Path(world.settings.directories.log).write_text("not a directory")
        observer = Recorder()
        await world.build(world.derive("a"), observer=observer)
        self.assertIn("-a.drv.gz' is not complete: Not a directory", observer.logs[-1])

    async def test_check(self) -> None:
        """B15: a check that differs says how to keep, or to compare, what was made."""
        world = World(self)
        drv = world.derive("a", "cat /proc/sys/kernel/random/uuid > $out")
        await world.build(drv)
        for keep, part in ((False, KEEP), (True, "`diffoscope'")):
            kind = Kind("", ("may not be deterministic", part), 1, "", False)
            await self.fails(world, kind, drv, mode=BuildMode.CHECK, keep_failed=keep)

    async def test_dependency(self) -> None:
        """B32: at the end of a chain, what failed at its beginning is named."""
        world = World(self)
        broken = world.derive("broken", "exit 1")
        middle = world.derive("middle", inputs=[broken])
        kind = Kind("", (f"the first that failed is `{broken}'",), 100, "", False)
        top = world.derive("top", inputs=[middle])
        observer = Recorder()
        with self.assertRaises(BuildError):
            await world.build(top, observer=observer)
        (said,) = [line for line in observer.logs if f"cannot build derivation `{top}'" in line]
        self.assertIn(kind.says[0], said)

    async def test_remembered(self) -> None:
        """B28: a failure that is remembered says how it is forgotten."""
        world = World(self, cache_failures=True)
        drv = world.derive("a", "echo said; exit 1")
        await self.fails(world, Kind("", ("exit code 1",)), drv)
        observer = Recorder()
        with self.assertRaises(BuildError):
            await world.build(drv, observer=observer)
        self.assertIn(f"`guix gc --clear-failures {drv}'", observer.logs[-1])
        self.assertEqual(observer.traces, [f"@ build-failed {drv} - cached"])

    async def test_lost(self) -> None:
        """B28: a builder that dies with the process that runs builders is not remembered."""
        world = World(self, cache_failures=True)
        drv = world.derive("a", "echo said; sleep 1000")
        observer = Recorder()
        building = world.build(drv, observer=observer)
        await observer.seen("said")
        os.kill(world.launcher.zygote_pid, signal.SIGKILL)
        with self.assertRaisesRegex(BuildError, "failed"):
            await building
        said = "signal 9 (Killed): the process that runs builders has died"
        self.assertTrue(any(said in line for line in observer.logs), observer.logs)
        self.assertEqual(world.store.database.failed_paths(), [])
        self.flushLoggedErrors()

    async def test_no_users(self) -> None:
        """X20: while another process has all build users, the client reads why nothing begins."""
        self.patch(users, "RETRY", 0.01)
        world = World(self, users=1)
        directory = world.settings.directories.state + "/userpool"
        lock = FileLock(f"{directory}/{FIRST_UID}")
        self.assertTrue(lock.acquire(exclusive=True))
        observer = Recorder()
        building = world.build(world.derive("a"), observer=observer)
        await observer.seen("waits for a build user")
        lock.close()
        await building


class TroubleTests(SynchronousTestCase):
    """What went wrong in the daemon itself."""

    def test_full_disk(self) -> None:
        """B36: what the system said, and what helps, however deep it came from."""
        full, closed = OSError(ENOSPC, "No space", "/x"), OSError(EACCES, "Permission denied", "/x")
        behind = StoreError("cannot copy it")
        behind.__cause__ = full
        for error, text, helps in (
            (full, "cannot access '/x': No space", True),
            (behind, "cannot copy it", True),
            (closed, "cannot access '/x': Permission denied", False),
        ):
            result = result_of(error)
            self.assertTrue(result.general)
            self.assertTrue(result.text.startswith(text), result.text)
            self.assertIs("`guix gc'" in result.text, helps)


class WordsTests(SynchronousTestCase):
    """The last lines of a log."""

    def test_lines(self) -> None:
        """The last lines that are not blank; of what was written over, the last."""
        log = b"".join(b"line %d\n\n" % number for number in range(30))
        lines = last_lines(log + b"10%\r50%\r100%\r\nend")
        self.assertEqual(lines[-3:], ("line 29", "100%", "end"))
        self.assertEqual(len(lines), MOST_LINES)
        self.assertEqual(last_lines(b""), ())
        self.assertEqual(last_lines(b"\n \n"), ())

    def test_hostile(self) -> None:
        """No control sequence, no long line and no bad character comes through."""
        (line,) = last_lines(b"\x1b[31mred\x1b[0m \x1b]0;title\x07\xff\x00" + b"y" * 100_000)
        self.assertTrue(line.isprintable())
        self.assertEqual(len(line), LONGEST + 1)
        (line,) = last_lines(b"\x1b[31mred\x1b[0m @ build-failed\x9b2J")
        self.assertEqual(line, "red @ build-failed\ufffd2J")
