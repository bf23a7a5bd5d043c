"""The daemon's side of the fetcher: starts it, asks it, and goes on when it dies."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from zope.interface import implementer

from guixd.errors import FetchError
from guixd.interfaces import IFetcher
from guixd.net.channel import Channel
from guixd.net.helpers import Death
from guixd.net.proxies import Proxies
from guixd.net.reach import Reach
from guixd.net.requests import LONGEST_BODY, Answer, Fetched, Head, Request
from guixd.net.spawning import StartedFetcher

_log = Logger()

SILENCE = 30.0
"""Seconds without a word until the helper is asked whether it lives, and once more until
it is taken for dead."""
TRIES = 3
"""How many helpers in turn may die of one lookup."""
_URLS_AT_ONCE = 200
_LARGEST = 1 << 62
_LOST = "the process that downloads has died"
_STOPPING = "the daemon is stopping"


class _Fetch:
    """A body that is on its way."""

    def __init__(
        self, head: Callable[[Head], None] | None, progress: Callable[[int], None] | None
    ) -> None:
        self.done: Deferred[Fetched]
        self.head = head
        self.progress = progress


class _Lookup:
    """URLs of which some have no answer yet."""

    def __init__(
        self,
        urls: Sequence[str],
        fields: Mapping[str, str],
        verify: bool,
        answered: Callable[[int, Answer], None],
        nearest: Reach,
    ) -> None:
        self.done: Deferred[None]
        self.open = dict(enumerate(urls))
        self.fields = dict(fields)
        self.verify = verify
        self.nearest = nearest
        self.answered = answered
        self.tries = 0
        self.parts: dict[int, list[bytes]] = {}


@implementer(IFetcher)
class Fetcher:
    """Fetches by way of a helper process, which is started at the first need.

    :param environ: where the variables of proxies are.
    :param ahead: a helper that was started before.
    :ivar compressions: what the helper can undo, once it runs.
    """

    def __init__(
        self,
        reactor: Any,
        environ: Mapping[str, str] = os.environ,
        ahead: StartedFetcher | None = None,
    ) -> None:
        self._reactor = reactor
        self._environ = environ
        self._proxies = Proxies.from_environment(environ)
        self._numbers = 0
        self._jobs: dict[int, _Fetch | _Lookup] = {}
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: Deferred[None] = succeed(None)
        self._timer: IDelayedCall | None = None
        self._heard = 0.0
        self._asked = False
        self._broken = ""
        self._stopped = False
        self._ahead = ahead
        self._helper: StartedFetcher | None = None
        self.compressions: tuple[str, ...] = ()

    @property
    def pid(self) -> int:
        """The process id of the helper, 0 if there is none."""
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the helper now, so that the first request need not wait for it.

        :raises OSError: it cannot be started.
        """
        if self._stopped:
            return
        if self._channel is not None:
            if self._jobs or (self._helper is not None and not self._helper.outdated):
                return
            self._retire()
        self._ahead, helper = None, self._ahead or StartedFetcher(self._environ)
        self._helper, process = helper, helper.process
        ended, before = Deferred[None](), self._ended

        def reap() -> None:
            process.wait()
            if self._process is process:
                self._process = None
                self._lost()
            ended.callback(None)

        self._process, self._broken = process, ""
        self._ended = ended.addCallback(lambda _: before)
        Death(self._reactor, os.pidfd_open(process.pid), reap)
        self._channel = Channel(self._reactor, helper.end, self._received, process.kill)
        proxies = self._proxies
        self._channel.send(["proxies", proxies.http, proxies.https, list(proxies.exceptions)])

    def _retire(self) -> None:
        """Let the helper go, as it does not know how this machine finds names now."""
        channel, self._channel = self._channel, None
        self._process = None
        if channel is not None:
            channel.close()

    def fetch(
        self,
        request: Request,
        sink: int,
        *,
        head: Callable[[Head], None] | None = None,
        progress: Callable[[int], None] | None = None,
        source: int | None = None,
    ) -> Deferred[Fetched]:
        """Fetch the body of REQUEST into the pipe SINK, whose descriptor is closed.

        :param head: called when the body begins, maybe after the first bytes are in the pipe,
            and when it goes on after it broke off.
        :param progress: called with the compressed bytes received, five times a second at most.
        :param source: the descriptor of a file with the body, which is closed, too.
        :return: a Deferred that fails with `FetchError`; cancelling it gives up.
        """
        descriptors = [sink] if source is None else [sink, source]
        job = _Fetch(head, progress)
        try:
            number = self._begin(job)
        except (OSError, FetchError) as error:
            for descriptor in descriptors:
                os.close(descriptor)
            return fail(_unavailable(error))
        job.done = Deferred(lambda _: self._cancel(number))
        assert self._channel is not None
        self._channel.send(["fetch", number, request.as_json()], descriptors=descriptors)
        return job.done

    def lookup(
        self,
        urls: Sequence[str],
        answered: Callable[[int, Answer], None],
        *,
        fields: Mapping[str, str] | None = None,
        verify: bool = False,
        nearest: Reach = Reach.LOOPBACK,
    ) -> Deferred[None]:
        """Ask for URLS, whose bodies are short; ANSWERED gets the index of each with its answer.

        :param fields: header fields of the requests.
        :param nearest: what the servers must not be nearer than.
        :return: a Deferred that fires when all are answered; cancelling it gives up.
        """
        if not urls:
            return succeed(None)
        job = _Lookup(urls, fields or {}, verify, answered, nearest)
        try:
            number = self._begin(job)
        except (OSError, FetchError) as error:
            return fail(_unavailable(error))
        job.done = Deferred(lambda _: self._cancel(number))
        self._ask(number, job)
        return job.done

    def stop(self) -> Deferred[None]:
        """Give everything up; the Deferred fires when the helper is gone."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()
        done: Deferred[None] = Deferred()
        self._ended.addCallback(lambda _: done.callback(None))
        return done

    def _begin(self, job: _Fetch | _Lookup) -> int:
        if self._stopped:
            raise FetchError("fetcher", _STOPPING)
        self.start()
        if not self._jobs:
            self._heard = self._reactor.seconds()
            self._watch()
        self._numbers += 1
        self._jobs[self._numbers] = job
        return self._numbers

    def _ask(self, number: int, job: _Lookup) -> None:
        assert self._channel is not None
        indices = sorted(job.open)
        begin = 0
        while begin < len(indices):
            # Numbers in one packet follow each other.
            end = begin + 1
            while (
                end < len(indices)
                and end - begin < _URLS_AT_ONCE
                and indices[end] == indices[end - 1] + 1
            ):
                end += 1
            urls = [job.open[index] for index in indices[begin:end]]
            asked = (urls, job.fields, job.verify, job.nearest)
            self._channel.send(["lookup", number, indices[begin], *asked])
            begin = end

    def _cancel(self, number: int) -> None:
        if self._forget(number) is not None and self._channel is not None:
            self._channel.send(["cancel", number])

    def _forget(self, number: int) -> _Fetch | _Lookup | None:
        job = self._jobs.pop(number, None)
        if not self._jobs and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return job

    # --- what the helper says -------------------------------------------------------

    def _received(self, message: list[Any], data: bytes, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)
        self._heard = self._reactor.seconds()
        self._asked = False
        try:
            self._handle(message, data)
        except Exception:  # noqa: BLE001
            # It deals with hostile bytes, so that nothing it says is beyond doubt.
            _log.failure("the process that downloads does not make sense")
            if self._process is not None:
                self._process.kill()

    def _handle(self, message: list[Any], data: bytes) -> None:
        what, *arguments = message
        if what == "broken":
            self._broken = str(arguments[0])
            return
        if what == "ready":
            self.compressions = tuple(map(str, arguments[0]))
            return
        if what == "pong":
            return
        number, *arguments = arguments
        job = self._jobs.get(number)
        if job is None:
            return
        if isinstance(job, _Lookup):
            assert what == "answer"
            self._answer(number, job, data, *arguments)
        elif what == "head":
            if job.head is not None:
                job.head(_head(arguments[0]))
        elif what == "progress":
            if job.progress is not None:
                job.progress(int(arguments[0]))
        elif what == "done":
            head, received, written = arguments
            fetched = Fetched(_head(head), int(received), int(written))
            self._forget(number)
            job.done.callback(fetched)
        elif what == "failed":
            kind, text, status = arguments
            error = FetchError(str(kind), str(text), int(status))
            self._forget(number)
            job.done.errback(error)

    def _answer(self, number: int, job: _Lookup, data: bytes, *told: Any) -> None:
        index, status, max_age, kind, baking, more = told
        if index not in job.open:
            return
        parts = job.parts.setdefault(index, [])
        parts.append(data)
        if sum(map(len, parts)) > LONGEST_BODY + len(data):
            raise ValueError("an answer is too long")
        if more:
            return
        age = None if max_age is None else int(max_age)
        answer = Answer(int(status), b"".join(parts), age, str(kind), bool(baking))
        del job.open[index], job.parts[index]
        if not job.open:
            self._forget(number)
        job.answered(index, answer)
        if not job.open and not job.done.called:
            job.done.callback(None)

    # --- its end --------------------------------------------------------------------

    def _watch(self) -> None:
        self._timer = self._reactor.callLater(SILENCE, self._look)

    def _look(self) -> None:
        self._watch()
        if self._reactor.seconds() - self._heard < SILENCE:
            return
        if self._asked and self._process is not None:
            _log.error("the process that downloads does not answer")
            self._process.kill()
        elif self._channel is not None:
            self._asked = True
            self._channel.send(["ping"])

    def _lost(self) -> None:
        """The helper has ended; fetches are for who wants them to try again, lookups go on."""
        channel, self._channel = self._channel, None
        self._asked = False
        if channel is not None:
            channel.close()
        if not self._stopped:
            _log.error("{lost} {why}", lost=_LOST, why=self._broken)
        text = f"{_LOST}: {self._broken}" if self._broken else _LOST
        text = _STOPPING if self._stopped else text
        for number, job in list(self._jobs.items()):
            if isinstance(job, _Lookup) and not self._stopped and not self._broken:
                job.tries += 1
                job.parts.clear()
                if job.tries < TRIES and self._start_again():
                    self._ask(number, job)
                    continue
            self._forget(number)
            if not job.done.called:
                job.done.errback(FetchError("fetcher", text))

    def _start_again(self) -> bool:
        try:
            self.start()
        except OSError:
            _log.failure("cannot start the process that downloads")
            return False
        return True


def _head(told: dict[str, Any]) -> Head:
    size = None if told["size"] is None else int(told["size"])
    if size is not None and not 0 <= size < _LARGEST:
        raise ValueError("a body cannot be so large")
    return Head(
        str(told["url"]),
        size,
        int(told["offset"]),
        str(told["validator"]),
    )


def _unavailable(error: Exception) -> FetchError:
    if isinstance(error, FetchError):
        return error
    return FetchError("fetcher", f"cannot start the process that downloads: {error}")
