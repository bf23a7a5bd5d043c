"""The daemon as clients of the stock Guix meet it: over TCP, without rights, crashed, crowded."""

from __future__ import annotations

import os
import re
import select
import signal

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, VERIFIED, Facts, Place
from tests.interop.test_sharing import events, read_until


def builder_of(log: str) -> int:
    """Return the process that the only `@ build-started` line of LOG names."""
    (started,) = events(log, "build-started")
    return int(started.split()[-1])


@requires_guest
class Crash(SynchronousTestCase):
    """What is left when guixd is killed in the middle of a build."""

    def test_kill(self) -> None:
        """The builder dies with the daemon; either daemon goes on with the store at once."""
        place = Place(self)
        place.start(GUIXD)
        client = place.scenario("slow.scm", SECONDS="1000")
        builder = os.pidfd_open(builder_of(read_until(client, "begun")))
        self.addCleanup(os.close, builder)
        place.kill(signal.SIGKILL)
        self.assertTrue(select.select([builder], [], [], 10)[0], "the builder is still there")
        self.assertNotEqual(place.finish(client, status=None).status, 0)
        place.start(STOCK)
        self.assertEqual(place.scheme("chain.scm", LENGTH="1")["result"], "ok")
        place.stop()
        place.start(GUIXD)
        again = place.scenario("slow.scm", SECONDS="1000")
        read_until(again, "begun")
        again.kill()
        again.communicate()
        self.assertEqual(place.scheme("chain.scm", LENGTH="2")["result"], "ok")
        place.stop()
        place.start(STOCK)
        said = place.run("guix", "gc", "--verify=contents").err.splitlines()
        self.assertEqual(said, VERIFIED)

    def test_terminate(self) -> None:
        """O20, O21: TERM ends builds and the daemon, and says so; nothing stays."""
        place = Place(self)
        place.start(GUIXD, "--stop-timeout=0")
        client = place.scenario("slow.scm", SECONDS="1000")
        builder = os.pidfd_open(builder_of(read_until(client, "begun")))
        self.addCleanup(os.close, builder)
        place.stop()
        self.assertTrue(select.select([builder], [], [], 10)[0], "the builder is still there")
        left = place.finish(client, status=None)
        self.assertNotEqual(left.status, 0)
        self.assertIn("the build daemon is stopping; try again", left.out + left.err)
        self.assertEqual(list((place.directory / "build").iterdir()), [])
        self.assertEqual(list((place.directory / "store").glob("*.chroot")), [])
        self.assertEqual(list((place.directory / "state/temproots").iterdir()), [])


@requires_guest
class Crowd(SynchronousTestCase):
    """Many clients at once."""

    def test_many(self) -> None:
        """B7, B9: six clients want parts of one chain; each link is built once."""
        place = Place(self)
        place.start(GUIXD, "--max-jobs=4")
        clients = [place.scenario("chain.scm", LENGTH=str(n)) for n in (7, 3, 5, 7, 1, 6)]
        answers = [Facts(place.finish(client).out) for client in clients]
        self.assertEqual([answer["result"] for answer in answers], ["ok"] * 6)
        longest = answers[0]
        for answer in answers:
            items = answer.strings("items")
            self.assertEqual(items, longest.strings("items")[-len(items) :])
        logs = re.findall(r"link-\d+\.drv\.gz", "\n".join(map(str, place.logs())))
        self.assertEqual(sorted(logs), [f"link-{n}.drv.gz" for n in range(7)])


@requires_guest
class Remote(SynchronousTestCase):
    """Clients that come by TCP."""

    def test_tcp(self) -> None:
        """O4, P19: they build, but may not collect garbage."""
        place = Place(self)
        place.start(GUIXD, tcp=True)
        address = {
            "GUIX_DAEMON_SOCKET": f"guix://127.0.0.1:{place.port}",
            "VIEW_NET": "host",
        }
        facts = place.scheme("chain.scm", LENGTH="2", **address)
        self.assertEqual(facts["result"], "ok")
        refused = place.finish(place.client("guix", "gc", "--list-dead", **address), status=1)
        self.assertIn("not allowed", refused.err)
