"""Build a small example with a private guixd, through its socket, and show what happened.

`python examples/demo` builds and ends; with `--serve` the daemon runs in the
foreground instead.  Everything is kept in `.demo/` of the checkout.
"""

from __future__ import annotations

import os
import shutil
import sys
import time

from daemon import CHECKOUT, Daemon, Place, demo_place
from hosttools import collect
from machine import namespaces, why_no_user_namespaces
from recipes import Cookbook
from show import BuildLog, heading, say, summary
from twisted.internet import task
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint

from guixd.client import Client, connect
from guixd.errors import GuixdError
from guixd.formats.operations import SetOptions
from guixd.formats.path import StoreDirectory, StorePath

OPTIONS = SetOptions(
    keep_failed=False,
    keep_going=False,
    try_fallback=False,
    verbosity=0,
    use_offload=False,
    build_verbosity=0,
    log_type=1,
    print_build_trace=True,
    use_substitutes=False,
    pairs=(("build-max-jobs", "2"), ("multiplexed-build-output", "true")),
)
SOURCE = CHECKOUT / "examples" / "hello-src"


async def fill(client: Client, place: Place) -> Cookbook:
    """Add all that the example is built from, and three derivations."""
    host = place.directory / "host-tools"
    shutil.rmtree(host, ignore_errors=True)
    collect(host)
    tools = await client.add_tree("host-tools", str(host))
    say(f"  {tools}   the host's shell, loader and C library")
    source = await client.add_tree("hello-src", str(SOURCE))
    say(f"  {source}   from {SOURCE.relative_to(CHECKOUT)}/")

    cookbook = Cookbook(StoreDirectory(str(place.store)), tools)

    async def script(name: str) -> StorePath:
        file, text = cookbook.script(name)
        return await client.add_text(file, text)

    when = time.strftime("%Y-%m-%d %H:%M:%S")
    greeting = cookbook.add("greeting", await script("greeting"), variables={"when": when})
    tool = cookbook.add("tool", await script("tool"), sources={"src": source})
    cookbook.add("hello", await script("hello"), inputs={"greeting": greeting, "tool": tool})
    for recipe in cookbook.recipes:
        added = await client.add_text(
            f"{recipe.name}.drv", recipe.text, recipe.derivation.references
        )
        if added != recipe.path:
            raise RuntimeError(f"the daemon calls {recipe.path} {added}")
        say(f"  {added}")
    return cookbook


async def show_result(client: Client, cookbook: Cookbook, log: BuildLog) -> None:
    """Print what was built and where."""
    heading("Who built it")
    summary(log.steps, namespaces())
    for recipe in cookbook.recipes:
        if recipe.name not in log.steps:
            say(f"  {recipe.name:>8}  was in the store already")

    hello = cookbook.recipes[-1].output
    info = await client.path_info(hello)
    heading("The result")
    say(f"  {hello}   {info.nar_size} bytes")
    say(f"  sha256 {info.nar_hash}")
    for reference in info.references:
        say(f"  refers to {reference}")
    say(f"\n  $ {hello}/bin/hello")
    say(os.popen(f"{hello}/bin/hello").read().rstrip("\n"))


async def demo(reactor: object) -> None:
    """Run the daemon and build with it."""
    place = demo_place()
    place.make()
    heading(f"Starting guixd in {place.directory}")
    say("  " + " ".join(place.command()[1:]))
    daemon = Daemon(reactor, place)
    try:
        await daemon.ready
        log = BuildLog()
        client = await connect(
            UNIXClientEndpoint(reactor, str(place.socket)),
            store=StoreDirectory(str(place.store)),
            log=log.message,
        )
        heading("Adding to the store")
        cookbook = await fill(client, place)
        heading("Building hello with two jobs")
        await client.set_options(OPTIONS)
        await client.build_paths([cookbook.recipes[-1].path])
        await show_result(client, cookbook, log)
        await client.close()
    except (RuntimeError, GuixdError) as error:
        say(f"\ndemo: {error}")
        say(f"The daemon's log is in {place.directory}/daemon.log; its last lines:")
        for line in (place.directory / "daemon.log").read_text(errors="replace").splitlines()[-15:]:
            say("  " + line)
        raise SystemExit(1) from None
    finally:
        await daemon.stop()
    heading("To use the same store with guix:  make run   and in another terminal")
    usage(place)


def usage(place: Place) -> None:
    """Print how a client finds the daemon."""
    say(f"  export GUIX_DAEMON_SOCKET={place.socket} NIX_STORE_DIR={place.store}")
    say("  guix gc --references $NIX_STORE_DIR/*-hello")


def serve() -> None:
    """Become the daemon."""
    place = demo_place()
    place.make()
    say(f"guixd serves {place.store} until Ctrl-C; in another terminal:")
    usage(place)
    command = place.command()
    os.execve(command[0], command, {**os.environ, **place.environment()})


def main(arguments: list[str]) -> int:
    """Return the exit status."""
    if os.geteuid() != 0:
        remedy = why_no_user_namespaces()
        if remedy is not None:
            say(f"demo: no containers here without root: {remedy}")
            return 1
    try:
        if arguments == ["--serve"]:
            serve()
        task.react(lambda reactor: Deferred.fromCoroutine(demo(reactor)))
    except PermissionError as error:
        say(f"demo: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
