"""A file server on loopback, near or as if far away, in a process of its own."""

from __future__ import annotations

import asyncio
import http.server
import shutil
import threading
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_fork = get_context("fork")
_BLOCK = 1 << 20


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: Any, output: Any) -> None:
        output.flush()
        self.connection.sendfile(source)


class _Listener(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that leave."""


class Server:
    """Serves the files in DIRECTORY at `url`.

    :param delay: seconds that anything takes in each direction, the kernel's own part not
        counted.  Relayed, because not every kernel can delay packets by itself.
    """

    def __init__(self, directory: Path, delay: float = 0.0) -> None:
        ours, theirs = _fork.Pipe()
        self._process = _fork.Process(target=_serve, args=(str(directory), delay, theirs))
        self._process.start()
        self.url = f"http://127.0.0.1:{ours.recv()}"

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


def _serve(directory: str, delay: float, answer: Connection) -> None:
    server = _Listener(("127.0.0.1", 0), lambda *args: _Handler(*args, directory=directory))
    port = server.server_address[1]
    if not delay:
        answer.send(port)
        server.serve_forever()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asyncio.run(_relay(int(port), delay, answer))


async def _relay(port: int, delay: float, answer: Connection) -> None:
    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        clock = asyncio.get_running_loop().time

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - clock()))
                if not data:
                    sink.close()
                    return
                sink.write(data)
                await sink.drain()

        async with asyncio.TaskGroup() as group:
            group.create_task(deliver())
            while data := await source.read(_BLOCK):
                await queue.put((clock() + delay, data))
            await queue.put((clock() + delay, b""))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * delay)  # what the handshake of TCP would take
        try:
            there, back = await asyncio.open_connection("127.0.0.1", port)
            async with asyncio.TaskGroup() as group:
                group.create_task(pump(reader, back))
                group.create_task(pump(there, writer))
        except* OSError:
            writer.close()

    relay = await asyncio.start_server(connected, "127.0.0.1", 0, limit=_BLOCK, backlog=256)
    answer.send(relay.sockets[0].getsockname()[1])
    await relay.serve_forever()


def fresh(directory: Path) -> Path:
    """Return DIRECTORY, new and empty."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
