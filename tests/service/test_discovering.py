"""`--discover` through the whole daemon, in a network of its own (spec: substitutes §11)."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import DeferredQueue
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.inotify import IN_DELETE, IN_MOVED_TO, INotify
from twisted.python.filepath import FilePath

from tests.net.lan import Machine, announce, connect, requires_lan
from tests.service.program import PROGRAM, WAIT, Program
from tests.service.substitutes import SubstituteCase

_HEAD_END = b"\r\n\r\n"


@requires_lan
class DiscoverTest(SubstituteCase):
    """The daemon is on one machine, and a server with one item on another."""

    def setUp(self) -> None:
        super().setUp()
        self.here, self.there = Machine(self), Machine(self)
        connect(self.here, self.there)

    def serve(self) -> None:
        """Serve what there is, at port 8080."""
        for name, data in self.answers.items():
            assert isinstance(data, bytes)
            file = Path(self.directory, "served" + name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data.partition(_HEAD_END)[2])
        command = ("-m", "http.server", "-b", "10.9.0.2", "-d", self.directory + "/served", "8080")
        server = subprocess.Popen(
            self.there.command(sys.executable, "-u", *command),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(server.communicate)
        self.addCleanup(server.kill)
        assert server.stdout is not None
        server.stdout.readline()  # It listens now.

    def begin(self, *options: str) -> Program:
        """Start a daemon; changes of its list are in `self.changes`."""
        command = self.here.command(*PROGRAM, "--substitute-urls=", *options)
        program = Program(
            self,
            command,
            NIX_STORE_DIR=self.store.path,
            GUIX_CONFIGURATION_DIRECTORY=self.directory + "/etc",
        )
        self.changes: DeferredQueue[str] = DeferredQueue()
        self.list = Path(program.directory, "var/discover/publish")
        self.list.parent.mkdir(parents=True)
        self.list.write_text("http://10.9.0.3:80\n")  # of another run
        notify = INotify()  # type: ignore[no-untyped-call]
        notify.startReading()
        self.addCleanup(notify.loseConnection)

        def changed(_: object, path: FilePath[str], mask: int) -> None:
            if path.basename() == b"publish":
                text = self.list.read_text() if self.list.exists() else ""
                self.changes.put("deleted" if mask & IN_DELETE else text)

        place = FilePath(str(self.list.parent))
        mask = IN_MOVED_TO | IN_DELETE
        notify.watch(place, mask, callbacks=[changed])  # type: ignore[no-untyped-call]
        program.state()
        return program

    def helpers(self, program: Program) -> list[int]:
        """Return the processes of PROGRAM that browse."""
        pid = program.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(n) for n in children if b"browser" in Path(f"/proc/{n}/cmdline").read_bytes()]

    async def test_substitute(self) -> None:
        """U25, O25: what a server in the local network has comes from there."""
        path = self.offer("item", b"from there")
        self.serve()
        take_back = announce(self, self.there, "10.9.0.2", "guix-publish-x=10.9.0.2:8080")
        program = self.begin("--discover")
        self.assertEqual(await self.changes.get(), "deleted")
        self.assertEqual(await self.changes.get(), "")
        self.assertEqual(await self.changes.get(), "http://10.9.0.2:8080\n")
        self.assertEqual(self.list.stat().st_mode & 0o777, 0o644)
        (helper,) = self.helpers(program)
        endpoint = UNIXClientEndpoint(reactor, program.socket)
        client = await self.client(endpoint, urls="")
        await client.build_paths([path])
        self.assertEqual(Path(path).read_bytes(), b"from there")
        self.assertEqual(await client.substitute_urls(), ())
        await client.close()
        take_back()
        self.assertEqual(await self.changes.get(), "")
        status, output = program.end()
        self.assertEqual(status, 0, output)
        self.assertEqual(await self.changes.get(), "deleted")
        self.assertEqual(os.listdir(self.list.parent), [])
        self.assertFalse(os.path.exists(f"/proc/{helper}"))

    async def test_death(self) -> None:
        """O25: the process that browses dies with the daemon."""
        program = self.begin("--discover=yes")
        self.assertEqual([await self.changes.get() for _ in range(2)], ["deleted", ""])
        (helper,) = self.helpers(program)
        descriptor = os.pidfd_open(helper)
        self.addCleanup(os.close, descriptor)
        program.end(signal.SIGKILL)
        self.assertTrue(select.select([descriptor], [], [], WAIT)[0])

    async def test_not_wanted(self) -> None:
        """O25: nobody browses, and the list is left alone."""
        program = self.begin("--discover=no")
        self.assertEqual(self.helpers(program), [])
        program.end()
        self.assertEqual(self.list.read_text(), "http://10.9.0.3:80\n")
        self.assertEqual(self.changes.pending, [])
