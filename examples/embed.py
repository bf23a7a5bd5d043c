"""A program with a build daemon of its own: python examples/embed.py DIRECTORY."""

import sys

from twisted.internet import task
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint

from guixd.client import connect
from guixd.formats.path import StoreDirectory
from guixd.service.daemon import GuixdService
from guixd.settings import Directories, Settings


async def main(reactor, directory):
    directories = Directories(
        store=directory + "/store",
        state=directory + "/var",
        database=directory + "/var/db",
        log=directory + "/log",
    )
    daemon = GuixdService(reactor, Settings(directories=directories, max_jobs=4))
    daemon.startService()
    try:
        client = await connect(
            UNIXClientEndpoint(reactor, directories.socket),
            store=StoreDirectory(directories.store),
        )
        path = await client.add_text("hello.txt", b"Hello, store!\n")
        info = await client.path_info(path)
        print(path, info.nar_size)
        await client.close()
    finally:
        await daemon.stopService()


if __name__ == "__main__":
    task.react(lambda reactor: Deferred.fromCoroutine(main(reactor, sys.argv[1])))
