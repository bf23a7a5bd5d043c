"""The log as one client sees it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.request import Level
from guixd.formats.operations import SetOptions
from guixd.service.clientlog import CHUNK, MOST_PENDING, ClientLog, whole_characters
from guixd.service.clientoptions import SessionOptions
from guixd.settings import Settings


class Messages:
    """A connection that records what it is told to send."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.pending = 0
        self.read: Deferred[None] = Deferred()

    def next(self, data: bytes) -> None:
        self.sent.append(bytes(data))

    async def drained(self) -> None:
        await self.read


def make(**options: object) -> tuple[ClientLog, Messages]:
    messages = Messages()
    session = SessionOptions(Settings())
    multiplexed = options.pop("multiplexed", None)
    for name, value in options.items():
        setattr(session, name, value)
    if multiplexed is not None:
        session.table["multiplexed-build-output"] = "true"
    log = ClientLog(messages, session)
    log.working = True
    return log, messages


class LogTests(SynchronousTestCase):
    def test_verbosity(self) -> None:
        """Lines above the client's verbosity are not sent."""
        log, messages = make(verbosity=1)
        log.log(Level.ERROR, "a")
        log.log(Level.INFO, "b\nc")
        log.log(Level.TALKATIVE, "d")
        self.assertEqual(messages.sent, [b"a\n", b"b\n", b"c\n"])

    def test_last_words(self) -> None:
        """P28: the end of a failed build's log, to who has perhaps not seen it, and where it is."""
        last, where = b"the last lines of its log:\n  > a\n  > b\n", b"the whole log is in `/f'\n"
        for options, expected in (
            ({"multiplexed": True, "print_trace": True}, last),
            ({"build_verbosity": 9, "print_trace": True}, last),
            ({"build_verbosity": 9}, last + where),
            ({"print_trace": True}, b""),
            ({}, where),
        ):
            log, messages = make(verbosity=1, **options)
            log.last_words(("a", "b"), "/f")
            self.assertEqual(b"".join(messages.sent), expected, options)
        log, messages = make(multiplexed=True)
        log.last_words((), "")
        self.assertEqual(messages.sent, [])

    def test_instead(self) -> None:
        """P28: who gets no lines for programs reads what stands in their place, if anything."""
        for wanted, expected in (True, [b"@ a b\n"]), (False, [b"it is b\n"]):
            log, messages = make(print_trace=wanted)
            log.trace("@ a b", "it is b")
            self.assertEqual(messages.sent, expected)

    def test_quiet_phase(self) -> None:
        """Nothing is sent while no operation is at work."""
        log, messages = make(print_trace=True)
        log.working = False
        log.log(Level.ERROR, "a")
        log.trace("@ x")
        log.output(1, b"y")
        self.assertEqual(messages.sent, [])

    def test_escapes(self) -> None:
        """Log type 1 marks levels, but never lines for programs."""
        log, messages = make(log_type=1, print_trace=True, verbosity=3)
        log.log(Level.ERROR, "a\n@ b")
        log.log(Level.INFO, "c")
        log.log(Level.CHATTY, "d")
        log.trace("@ e")
        self.assertEqual(messages.sent, [b"\x1b[0sa\n", b"@ b\n", b"c\n", b"\x1b[3sd\n", b"@ e\n"])

    def test_traces(self) -> None:
        """P26: without verbosity for builds there is no output, but there are traces."""
        log, messages = make(print_trace=True, verbosity=0, build_verbosity=1)
        log.trace("@ build-started x")
        log.output(1, b"text")
        self.assertEqual(messages.sent, [b"@ build-started x\n"])

    def test_no_traces(self) -> None:
        log, messages = make(verbosity=5)
        log.trace("@ x")
        self.assertEqual(messages.sent, [])


class OutputTests(SynchronousTestCase):
    def test_raw(self) -> None:
        log, messages = make()
        log.output(7, b"abc")
        log.output(7, b"\xff\x00")
        self.assertEqual(messages.sent, [b"abc", b"\xff\x00"])

    def test_multiplexed(self) -> None:
        """P25: the length in the header is that of the rest of the message."""
        log, messages = make(multiplexed=True)
        log.output(42, b"a\xc3")
        log.output(42, b"\xa4b")
        log.output(43, b"\xe2\x82")
        log.finish()
        self.assertEqual(
            messages.sent,
            [
                b"@ build-log 42 1\na",
                b"@ build-log 42 3\n\xc3\xa4b",
                b"@ build-log 43 2\n\xe2\x82",
            ],
        )

    def test_unfinished_before_line(self) -> None:
        """Bytes that waited for the rest of a character come before a later line."""
        log, messages = make(print_trace=True)
        log.output(1, b"\xc3")
        log.trace("@ build-failed")
        self.assertEqual(messages.sent, [b"\xc3", b"@ build-failed\n"])

    def test_full(self) -> None:
        """Builders are asked to wait while the client is behind."""
        log, messages = make()
        self.assertIsNone(log.full())
        messages.pending = MOST_PENDING
        waiting = log.full()
        assert waiting is not None
        self.assertNoResult(waiting)
        messages.read.callback(None)
        self.successResultOf(waiting)

    @settings(deadline=None, max_examples=40)
    @given(st.text(max_size=20).map(str.encode), st.integers(1, 9), st.integers(1, 4000))
    def test_characters(self, text: bytes, step: int, repeat: int) -> None:
        """However text is cut, each message has whole characters, and none is lost."""
        log, messages = make()
        data = text * repeat if step == 9 else text
        size = len(data) // 3 + 1 if step == 9 else step
        for start in range(0, len(data), size):
            log.output(1, data[start : start + size])
        for message in messages.sent:
            message.decode()
            self.assertLessEqual(len(message), CHUNK)
        log.finish()
        self.assertEqual(b"".join(messages.sent), data)

    @settings(deadline=None, max_examples=100)
    @given(st.binary(max_size=12))
    def test_any_bytes(self, data: bytes) -> None:
        """At most three bytes are kept back, whatever they are."""
        self.assertLessEqual(len(data) - whole_characters(data), 3)


class SettingsPersistTests(SynchronousTestCase):
    def test_debug(self) -> None:
        """The session begins at level 4 with --debug, at 1 without."""
        self.assertEqual(SessionOptions(Settings(debug=True)).verbosity, 4)
        options = SessionOptions(Settings())
        self.assertEqual(options.verbosity, 1)
        options.apply(SetOptions(False, False, False, 0))
        self.assertEqual(options.verbosity, 0)
