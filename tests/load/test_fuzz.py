"""The protocol, spoken well and badly, with a whole daemon at the other end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

from guixd.formats import operations as op
from guixd.formats.messages import ERROR, Greeting
from guixd.formats.path import StorePath
from guixd.formats.wire import encode_int, encode_string
from tests.load.conversations import (
    Conversation,
    conversations,
    exchange,
    garbage,
    imports,
    replies,
    spoilt,
)
from tests.load.crowd import CrowdCase

ROOM = 48 << 20
"""Bytes that the daemon may use more after the start."""
SEED = 20261126
cuts = st.lists(st.integers(1, 2000), max_size=3)
_HUGE = encode_int(2**32 - 1)
_chosen: Any = settings(
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class FuzzTests(CrowdCase):
    def setUp(self) -> None:
        super().setUp()
        self.known: list[StorePath] = self.fill(20)
        self.canary = self.client()
        self.before = self.memory()

    def speak(self, data: bytes, cut: list[int], *enough: Callable[[bytes], bool]) -> bytes:
        """Send DATA; return the answer, and see that the daemon is as well as before."""
        peer = self.peer()
        try:
            answer = exchange(peer.socket, data, cut, *enough)
        finally:
            peer.close()
        self.assertEqual(self.canary.ask(op.BuiltinBuilders()), ("download", "git-download"))
        self.assertLess(self.memory() - self.before, ROOM)
        # All of the output would be too much to read.
        self.assertEqual(self.program.output.partition("Traceback")[2][:2000], "")
        return answer

    @given(conversations, cuts)
    @seed(SEED)
    @_chosen
    def test_right(self, conversation: Conversation, cut: list[int]) -> None:
        """Whatever is asked for, each request has its reply or an error."""

        def complete(answer: bytes) -> bool:
            return replies(answer, conversation, self.store) is not None

        answer = self.speak(conversation.encode(self.store, self.known), cut, complete)
        # The last one may be an error that ends all.
        found = replies(answer, conversation, self.store)
        if found is None:
            self.assertIn(ERROR, answer)

    @given(conversations | imports, st.data(), cuts)
    @seed(SEED)
    @_chosen
    def test_nearly_right(self, conversation: Conversation, data: Any, cut: list[int]) -> None:
        """A conversation with faults in it."""
        self.speak(data.draw(spoilt(conversation.encode(self.store, self.known))), cut)

    @given(st.lists(garbage, max_size=8).map(b"".join), cuts)
    @example(encode_int(8) + encode_string("a") + _HUGE, [])
    @example(encode_int(31) + _HUGE + encode_string("/"), [])
    @example(encode_int(7) + encode_string("a") + encode_int(1) * 2 + _HUGE, [])
    @example(encode_int(27) + _HUGE * 9, [])
    @seed(SEED)
    @_chosen
    def test_garbage(self, data: bytes, cut: list[int]) -> None:
        """Anything, before and after a greeting."""
        self.speak(data, cut)
        self.speak(Greeting().encode() + data, cut)
