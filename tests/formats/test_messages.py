"""The greeting and the messages."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import ProtocolError
from guixd.formats import messages as m
from guixd.formats.wire import MORE, More, Source, encode_int
from tests.formats.protocol import texts

WORKED = "6378696e00000000640100000000000000000000000000000100000000000000"

message_values = st.one_of(
    st.builds(m.Next, st.binary(max_size=30)),
    st.builds(m.Write, st.binary(max_size=30)),
    st.builds(m.Read, st.integers(0, 2**32 - 1)),
    st.builds(m.Last),
    st.builds(m.Failed, texts, st.integers(0, 255)),
)


def encode(message: m.Message) -> bytes:
    """Return the bytes of MESSAGE."""
    match message:
        case m.Next(text):
            return m.encode_next(text)
        case m.Write(data):
            return m.encode_write(data)
        case m.Read(size):
            return m.encode_read(size)
        case m.Failed(text, status):
            return m.encode_error(text, status)
        case m.Last():
            return m.LAST


def greet(data: bytes, *, step: int = 1000) -> tuple[m.Greeting | More, bytes, bytes]:
    """Greet a server with DATA; return the greeting, its answer, and what is left."""
    source = Source()
    handshake = m.ServerHandshake()
    greeting: m.Greeting | More = MORE
    for start in range(0, len(data), step):
        source.feed(data[start : start + step])
        if greeting is MORE:
            greeting = handshake.resume(source)
        source.settle()
    return greeting, handshake.to_send, source.rest()


class Handshake(SynchronousTestCase):
    """The greeting of both sides."""

    def test_worked(self) -> None:
        """P1: the worked handshake."""
        self.assertEqual(m.Greeting().encode().hex(), WORKED)
        greeting, answer, rest = greet(bytes.fromhex(WORKED) + b"more")
        self.assertEqual(greeting, m.Greeting(0x164, None, True))
        self.assertEqual(answer.hex(), "6f697864000000006401000000000000")
        self.assertEqual(rest, b"more")
        self.assertEqual(m.LAST.hex(), "73746c6100000000")

    def test_answer_comes_first(self) -> None:
        """P1: the server answers the magic number before it knows the version."""
        greeting, answer, _ = greet(encode_int(m.CLIENT_MAGIC))
        self.assertIs(greeting, MORE)
        self.assertEqual(answer, m.ANSWER)

    def test_wrong_magic(self) -> None:
        """P2: another first word, or one with high bytes, gets no answer."""
        for word in (b"GET / HT", encode_int(0), encode_int(m.CLIENT_MAGIC)[:7] + b"\x01"):
            source = Source()
            source.feed(word)
            handshake = m.ServerHandshake()
            self.assertRaises(m.NotAClient, handshake.resume, source)
            self.assertEqual(handshake.to_send, b"")

    def test_versions(self) -> None:
        """P3: the optional fields follow the minor version; the major one is ignored."""
        magic, one = encode_int(m.CLIENT_MAGIC), encode_int(1)
        for major in (0x000, 0x100, 0x200):
            for minor, words in (
                (0x00, 0),
                (0x07, 0),
                (0x0A, 0),
                (0x0B, 1),
                (0x0E, 2),
                (0x60, 2),
                (0x61, 2),
                (0x64, 2),
                (0xFF, 2),
            ):
                version = major | minor
                data = magic + encode_int(version) + encode_int(0) * words + one
                greeting, _, rest = greet(data, step=1)
                self.assertEqual(greeting, m.Greeting(version, None, words == 0))
                self.assertEqual(rest, one)
                assert greeting is not MORE
                self.assertEqual(greeting.minor, minor)

    def test_processor(self) -> None:
        """The number of a processor follows its flag, if that is set."""
        value = m.Greeting(0x164, 5, False)
        self.assertEqual(greet(value.encode(), step=3)[0], value)

    def test_client_side(self) -> None:
        """A client takes any minor version but only its own major one."""
        for data, expected in (
            (m.ANSWER, 0x164),
            (encode_int(m.SERVER_MAGIC) + encode_int(0x161), 0x161),
            (m.ANSWER[:15], MORE),
        ):
            source = Source()
            source.feed(data)
            self.assertEqual(m.ClientHandshake().resume(source), expected)
        for data in (encode_int(1), encode_int(m.SERVER_MAGIC) + encode_int(0x264)):
            source = Source()
            source.feed(data)
            self.assertRaises(ProtocolError, m.ClientHandshake().resume, source)


class Messages(SynchronousTestCase):
    """What comes before a reply."""

    @settings(deadline=None, max_examples=60)
    @given(st.lists(message_values, max_size=4))
    def test_round_trip(self, values: list[m.Message]) -> None:
        """Messages come out as they went in, byte by byte."""
        data = b"".join(map(encode, values))
        source = Source()
        reader = m.MessageReader()
        found = []
        for index in range(len(data)):
            source.feed(data[index : index + 1])
            message = reader.resume(source)
            source.settle()
            if message is not MORE:
                found.append(message)
        self.assertEqual(found, values)

    def test_status(self) -> None:
        """P4: clients of minor versions below 8 get and read errors without a status."""
        self.assertEqual(m.encode_error("x", 100, 8), m.encode_error("x", 100))
        plain = m.encode_error("x", 100, 7)
        self.assertEqual(plain + encode_int(100), m.encode_error("x", 100))
        source = Source()
        source.feed(plain)
        self.assertEqual(m.MessageReader(7).resume(source), m.Failed("x", 1))

    def test_unknown(self) -> None:
        """A word that is no message is an error."""
        source = Source()
        source.feed(encode_int(3))
        self.assertRaises(ProtocolError, m.MessageReader().resume, source)
