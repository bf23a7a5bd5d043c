"""Two clients that want the same item at the same time."""

from __future__ import annotations

import subprocess

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, VERIFIED, Facts, Place

OTHER = "other-socket"
OTHER_ENVIRONMENT = {"GUIX_DAEMON_SOCKET": f"/var/guix/daemon-socket/{OTHER}"}


def read_until(process: subprocess.Popen[str], wanted: str, *, errors: bool = False) -> str:
    """Return what a client writes, to standard error if ERRORS, up to the line with WANTED."""
    stream, other = (process.stdout, process.stderr)[:: -1 if errors else 1]
    assert stream is not None
    seen = ""
    for line in stream:
        seen += line
        if wanted in line:
            return seen
    raise AssertionError(f"no {wanted!r} in: {seen}{other and other.read()}")


def events(log: str, event: str) -> list[str]:
    """Return the lines of EVENT in what a client saw."""
    return [line for line in log.splitlines() if line.startswith(f"@ {event} ")]


@requires_guest
class Sharing(SynchronousTestCase):
    """One build for all who want it."""

    def test_two_clients(self) -> None:
        """B7, P28: one builder runs; both see its log from the start, and its result."""
        place = Place(self)
        place.start(GUIXD)
        first = place.scenario("slow.scm", SECONDS="1.5")
        begun = read_until(first, "begun")
        second = place.finish(place.scenario("slow.scm", SECONDS="1.5")).out
        ended = begun + place.finish(first).out
        self.assertEqual(events(ended, "build-started"), events(second, "build-started"))
        self.assertEqual(len(events(second, "build-started")), 1)
        for log in ended, second:
            self.assertIn("begun\n", log)
            self.assertIn("ended\n", log)
        self.assertEqual(Facts(ended)["contents"], Facts(second)["contents"])

    def test_first_leaves(self) -> None:
        """B8: the build goes on for the second client when the first has gone."""
        place = Place(self)
        place.start(GUIXD)
        first = place.scenario("slow.scm", SECONDS="1.5")
        started = events(read_until(first, "begun"), "build-started")
        second = place.scenario("slow.scm", SECONDS="1.5")
        seen = read_until(second, "begun")
        first.kill()
        first.communicate()
        seen += place.finish(second).out
        self.assertEqual(events(seen, "build-started"), started)
        self.assertEqual(len(events(seen, "build-succeeded")), 1)

    def test_last_leaves(self) -> None:
        """P27: no client, no build; the next one starts anew and finishes."""
        place = Place(self)
        place.start(GUIXD)
        first = place.scenario("slow.scm", SECONDS="1000")
        read_until(first, "begun")
        first.kill()
        first.communicate()
        # The same derivation again, so that what was left of the first is in the way.
        again = place.scenario("slow.scm", SECONDS="1000")
        seen = read_until(again, "begun")
        again.kill()
        again.communicate()
        self.assertEqual(len(events(seen, "build-started")), 1)

    def test_two_daemons(self) -> None:
        """B35: guixd waits for what the stock daemon builds in the same store, and uses it."""
        place = Place(self)
        place.start(STOCK, name=OTHER)
        place.start(GUIXD)
        first = place.scenario("slow.scm", SECONDS="1", **OTHER_ENVIRONMENT)
        begun = read_until(first, "begun")
        second = place.finish(place.scenario("slow.scm", SECONDS="1")).out
        ended = begun + place.finish(first).out
        self.assertEqual(events(second, "build-started"), [])
        self.assertEqual(Facts(ended)["contents"], Facts(second)["contents"])
        # and both go on, with what the other one built
        chains = [
            place.scenario("chain.scm", LENGTH=length, **environment)
            for length, environment in (("3", {}), ("6", OTHER_ENVIRONMENT))
        ]
        for chain in chains:
            self.assertEqual(Facts(place.finish(chain).out)["result"], "ok")


@requires_guest
class TakeOver(SynchronousTestCase):
    """The store of one daemon under the other, with no step in between."""

    def take_turns(self, *daemons: str) -> None:
        place = Place(self)
        known: list[str] = []
        for length, daemon in enumerate(daemons, 1):
            place.start(daemon)
            facts = place.scheme("chain.scm", LENGTH=str(length))
            self.assertEqual(facts["result"], "ok")
            self.assertEqual(facts.strings("built"), [f"link-{length - 1}.drv"])
            infos = facts["infos"].strip("()").split(") (")
            self.assertEqual(infos[1:], known)
            known = infos
            if daemon == STOCK:
                said = place.run("guix", "gc", "--verify=contents").err.splitlines()
                self.assertEqual(said, VERIFIED)
            place.stop()
        self.assertEqual(
            [p for p in (place.directory / "store").glob("*.lock") if p.stat().st_size], []
        )

    def test_from_stock(self) -> None:
        """The stock daemon's items serve guixd, and its own go back."""
        self.take_turns(STOCK, GUIXD, STOCK, GUIXD)

    def test_to_stock(self) -> None:
        """What guixd made from nothing is a store that the stock daemon verifies and builds in."""
        self.take_turns(GUIXD, STOCK, GUIXD, STOCK)


@requires_guest
class OwnName(SynchronousTestCase):
    """A store of another name than /gnu/store."""

    def test_private_store(self) -> None:
        """A client told of the names by its environment builds in a store anywhere."""
        place = Place(self)
        place.binds = {}
        place.names = {
            "NIX_STORE_DIR": str(place.directory / "store"),
            "GUIX_STATE_DIRECTORY": str(place.directory / "state"),
            "GUIX_LOG_DIRECTORY": str(place.directory / "log"),
            "GUIX_DAEMON_SOCKET": str(place.directory / "state/daemon-socket/socket"),
        }
        place.start(GUIXD)
        facts = place.scheme("chain.scm", LENGTH="2")
        self.assertEqual(facts["result"], "ok")
        for item in facts.strings("items"):
            self.assertTrue(item.startswith(str(place.directory / "store/")))
