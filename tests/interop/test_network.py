"""The network of builds with a fixed output, beside the stock daemon (spec: sandbox §7)."""

from __future__ import annotations

import hashlib

from twisted.trial.unittest import SynchronousTestCase

from tests.interop.guest import requires_guest
from tests.interop.place import GUIXD, STOCK, Facts, Place
from tests.interop.test_downloads import CONTENT, _Answers, serve
from tests.uplink.slirp import requires_slirp, slirp_directory


@requires_slirp
@requires_guest
class Networks(SynchronousTestCase):
    """Builds that the stock client asks for."""

    maxDiff = None

    def test_network(self) -> None:
        """X9, X29: the machine's loopback is reached unless it is isolated; all is the same."""
        page = serve(self, _Answers).rpartition(":")[2] + "/good"
        for options, reached in ((), "ok"), (("--isolate-host-loopback",), "1"):
            stock, guixd = (self.facts(daemon, page, *options) for daemon in (STOCK, GUIXD))
            self.assertEqual(list(stock), list(guixd))
            for label, value in stock.items():
                self.assertEqual(value, guixd[label], label)
            self.assertEqual([guixd[label] for label in ("fetched", "local")], [reached] * 2)
            self.assertEqual(guixd["not fixed"], "100")
            self.assertIn("inet 10.0.2.100/24", guixd["facts log"])

    def facts(self, daemon: str, page: str, *options: str) -> Facts:
        """Run DAEMON with OPTIONS; return what builds met that fetch PAGE of this machine."""
        place = Place(self)
        place.names["VIEW_NET"] = "host"
        if daemon == GUIXD:
            place.daemon_path = slirp_directory(self)
        place.start(daemon, *options)
        wanted = hashlib.sha256(CONTENT).hexdigest()
        facts = place.scheme("network.scm", PAGE=page, WANTED=wanted)
        place.stop()
        return facts
