"""The options of one client."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadSetting
from guixd.formats.operations import SetOptions
from guixd.service.clientoptions import MOST_SETTINGS, SessionOptions, read_integer
from guixd.settings import Settings


def request(*pairs: tuple[str, str], **fields: object) -> SetOptions:
    values: dict[str, object] = {
        "keep_failed": False,
        "keep_going": False,
        "try_fallback": False,
        "verbosity": 0,
    }
    return SetOptions(**{**values, **fields}, pairs=pairs)  # type: ignore[arg-type]


class PairTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.options = SessionOptions(Settings())

    def refuse(self, name: str, value: str) -> None:
        trusted = SessionOptions(Settings(), trusted=True)
        error = self.assertRaises(BadSetting, trusted.apply, request((name, value)))
        self.assertIn(name, error.text)

    def test_bad_values(self) -> None:
        """P21: integers and booleans have their exact forms."""
        for value in ("abc", "", "1 ", "1x", "0x10", "4294967296", "- 1", "\u0661"):
            self.refuse("build-max-jobs", value)
        for value in ("1", "True", "yes", ""):
            self.refuse("multiplexed-build-output", value)
        self.refuse("build-keep-log", "on")

    def test_good_values(self) -> None:
        """P21: -1 wraps, blanks before a number are skipped."""
        self.options.apply(request(("build-max-jobs", "-1"), ("build-cores", " +7")))
        chosen = self.options.for_builds(5, 6)
        self.assertEqual((chosen.max_jobs, chosen.cores), (2**32 - 1, 7))
        self.assertEqual((chosen.client_uid, chosen.client_gid), (5, 6))

    def test_everybody(self) -> None:
        """Some settings every client may set; they last until they are set again."""
        self.options.apply(
            request(
                ("build-timeout", "5"),
                ("build-max-silent-time", "-3"),
                ("build-repeat", "2"),
                ("multiplexed-build-output", "true"),
            )
        )
        self.options.apply(request())
        chosen = self.options.for_builds(None, None)
        self.assertEqual((chosen.timeout, chosen.max_silent_time, chosen.rounds), (5, 0, 3))
        self.assertTrue(self.options.multiplexed)

    def test_untrusted(self) -> None:
        """P22: what an untrusted client sets by name is kept under another name."""
        self.options.apply(request(("substitute-urls", "http://a http://b"), ("system", "x")))
        self.assertEqual(self.options.table["untrusted-substitute-urls"], "http://a http://b")
        self.assertNotIn("substitute-urls", self.options.table)
        self.assertNotIn("system", self.options.table)

    def test_trusted(self) -> None:
        trusted = SessionOptions(Settings(), trusted=True)
        trusted.apply(request(("build-max-log-size", "9"), ("user-name", "x")))
        self.assertEqual(trusted.for_builds(0, 0).max_log_size, 9)
        self.assertEqual(trusted.table["user-name"], "x")

    def test_user_name(self) -> None:
        """P23: only without credentials is a user's name taken from the options."""
        remote = SessionOptions(Settings(), remote=True)
        self.assertEqual(remote.apply(request(("user-name", "x"))), ["x"])
        self.assertNotIn("untrusted-user-name", remote.table)
        self.assertEqual(self.options.apply(request(("user-name", "x"))), [])

    def test_rounds(self) -> None:
        """O24: a bad number of rounds fails builds; 0 rounds are 1."""
        self.options.apply(request(("build-repeat", "-1")))
        self.assertEqual(self.options.for_builds(None, None).rounds, 1)
        self.options.apply(request(("build-repeat", "18446744073709551615")))
        self.assertRaises(BadSetting, self.options.for_builds, None, None)

    def test_limit(self) -> None:
        """A session cannot store any number of settings."""
        pairs = [(f"name-{n}", "x") for n in range(MOST_SETTINGS + 1)]
        self.assertRaises(BadSetting, self.options.apply, request(*pairs))

    @example_settings(deadline=None, max_examples=100)
    @given(st.text(alphabet="+- 0123456789x", max_size=8))
    def test_integers(self, text: str) -> None:
        """An integer is read as its decimal value modulo 2**32, or refused."""
        try:
            number = read_integer("n", text, bits=32, signed=False)
        except BadSetting:
            return
        self.assertEqual(number, int(text) % 2**32)


class PositionalTests(SynchronousTestCase):
    def test_replaced(self) -> None:
        options = SessionOptions(Settings())
        options.apply(request(keep_failed=True, keep_going=True, try_fallback=True))
        chosen = options.for_builds(None, None)
        self.assertTrue(chosen.keep_failed and chosen.keep_going and chosen.fallback)
        options.apply(request())
        chosen = options.for_builds(None, None)
        self.assertFalse(chosen.keep_failed or chosen.keep_going or chosen.fallback)

    def test_remote(self) -> None:
        """Clients on TCP cannot keep failed build trees."""
        options = SessionOptions(Settings(), remote=True)
        options.apply(request(keep_failed=True))
        self.assertFalse(options.for_builds(None, None).keep_failed)

    def test_old_clients(self) -> None:
        """Old versions send limits at fixed positions."""
        options = SessionOptions(Settings())
        options.apply(request(max_jobs=3, max_silent_time=4, build_cores=5))
        chosen = options.for_builds(None, None)
        self.assertEqual((chosen.max_jobs, chosen.max_silent_time, chosen.cores), (3, 4, 5))

    def test_offload(self) -> None:
        """The client's wish replaces the administrator's."""
        options = SessionOptions(Settings(offload=False))
        self.assertFalse(options.for_builds(None, None).offload)
        options.apply(request(use_offload=True))
        self.assertTrue(options.for_builds(None, None).offload)

    def test_administrator(self) -> None:
        """O15: clients begin with the daemon's options."""
        options = SessionOptions(Settings(cores=42, max_jobs=7, timeout=1, rounds=2))
        chosen = options.for_builds(None, None)
        self.assertEqual(
            (chosen.cores, chosen.max_jobs, chosen.timeout, chosen.rounds), (42, 7, 1, 2)
        )


class SubstituteTests(SynchronousTestCase):
    def test_off(self) -> None:
        """P20, O13: once off, substitutes stay off."""
        options = SessionOptions(Settings(substitute_urls=("http://x",)))
        options.apply(request(use_substitutes=True))
        self.assertEqual(options.substitute_urls(), ("http://x",))
        options.apply(request(use_substitutes=False))
        options.apply(request(use_substitutes=True))
        self.assertEqual(options.substitute_urls(), ())
        options = SessionOptions(Settings(use_substitutes=False))
        options.apply(request(use_substitutes=True))
        self.assertEqual(options.substitute_urls(), ())

    def test_urls(self) -> None:
        """P20, O14: the client's list, if any, replaces the daemon's."""
        for trusted in (False, True):
            options = SessionOptions(Settings(substitute_urls=("http://x",)), trusted=trusted)
            options.apply(request(("substitute-urls", " http://b  http://a")))
            self.assertEqual(options.substitute_urls(), ("http://b", "http://a"))
        options = SessionOptions(Settings(substitute_urls=("http://x",)))
        options.apply(request(("substitute-urls", "")))
        self.assertEqual(options.substitute_urls(), ("http://x",))

    def test_servers(self) -> None:
        """U16: what lookups use; an empty list means none, whoever sets it."""
        for trusted in (False, True):
            options = SessionOptions(Settings(substitute_urls=("http://x",)), trusted=trusted)
            self.assertEqual(options.for_builds(None, None).substitute_urls, ("http://x",))
            options.apply(request(("substitute-urls", " http://b  http://a")))
            chosen = options.for_builds(None, None)
            self.assertEqual(chosen.substitute_urls, ("http://b", "http://a"))
            options.apply(request(("substitute-urls", "")))
            chosen = options.for_builds(None, None)
            self.assertEqual(chosen.substitute_urls, ())
            self.assertFalse(chosen.may_substitute)

    def test_discover(self) -> None:
        """U25: whether discovered servers are used is for the trusted to say."""
        for on in (False, True):
            for trusted in (False, True):
                options = SessionOptions(Settings(discover=on), trusted=trusted)
                self.assertIs(options.for_builds(None, None).discover, on)
                options.apply(request(("discover", "false" if on else "true")))
                self.assertIs(options.for_builds(None, None).discover, on is not trusted)
        options = SessionOptions(Settings(discover=True, substitute_urls=()))
        self.assertTrue(options.for_builds(None, None).may_substitute)
        options.apply(request(use_substitutes=False))
        self.assertFalse(options.for_builds(None, None).may_substitute)
