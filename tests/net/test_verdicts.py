"""Judging while more comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import SignatureError
from guixd.formats.narinfo import Narinfo
from guixd.formats.path import StoreDirectory, StorePath
from guixd.net.verdicts import AT_ONCE, THREADS, Verdicts


def _narinfo(path: StorePath, signature: str = "1;host;x") -> Narinfo:
    return Narinfo(
        path, "sha256", bytes(32), 120, frozenset(), None, (), signature=signature, signed=b"x"
    )


class VerdictsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.store = StoreDirectory()
        self.steps: list[tuple[Callable[[], Any], Deferred[Any]]] = []
        self.sizes: list[int] = []
        self.verdicts = Verdicts(self.thread, self.judge)

    def thread(self, function: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
        result: Deferred[Any] = Deferred()
        self.steps.append((lambda: function(*arguments), result))
        return result

    def judge(self, narinfos: Sequence[Narinfo]) -> list[bool]:
        self.sizes.append(len(narinfos))
        return [not each.path.name.endswith("3") for each in narinfos]

    def go_on(self) -> None:
        """Let the thread end that began first."""
        step, result = self.steps.pop(0)
        try:
            value = step()
        except SignatureError:
            result.errback()
        else:
            result.callback(value)

    def add(self, count: int) -> list[StorePath]:
        paths = [self.store.child(f"{n:032}-item-{n}") for n in range(count)]
        for path in paths:
            self.verdicts.add(path, _narinfo(path))
        return paths

    def test_while_more_comes(self) -> None:
        """U1, U2: judging begins with the first few, in few threads; the good ones are returned."""
        paths = self.add(AT_ONCE - 1)
        self.assertEqual(self.steps, [])
        self.verdicts.add(paths[0], _narinfo(paths[0], signature=""))
        self.assertEqual(self.steps, [])
        self.verdicts = Verdicts(self.thread, self.judge)
        paths = self.add(AT_ONCE * (THREADS + 1) + 1)
        self.assertEqual(len(self.steps), THREADS)
        done = Deferred.fromCoroutine(self.verdicts.all())
        while self.steps:
            self.assertNoResult(done)
            self.assertLessEqual(len(self.steps), THREADS)
            self.go_on()
        good = self.successResultOf(done)
        self.assertEqual(set(good), {path for path in paths if not path.name.endswith("3")})
        self.assertEqual(self.sizes, [AT_ONCE] * (THREADS + 1) + [1])

    def test_nothing(self) -> None:
        """U2: without signatures nothing is good, and nobody is asked."""
        done = Deferred.fromCoroutine(self.verdicts.all())
        self.assertEqual(self.successResultOf(done), [])

    def test_trouble(self) -> None:
        """U29: a list of keys that cannot be read is told, and nothing else is judged."""

        def judge(narinfos: Sequence[Narinfo]) -> list[bool]:
            raise SignatureError("unreadable")

        self.verdicts = Verdicts(self.thread, judge)
        self.add(AT_ONCE * (THREADS + 2))
        done = Deferred.fromCoroutine(self.verdicts.all())
        for _ in range(THREADS):
            self.assertNoResult(done)
            self.go_on()
        self.assertEqual(self.steps, [])
        self.failureResultOf(done, SignatureError)
