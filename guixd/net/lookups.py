"""Many small answers at once: several connections to each server, several requests on each."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from guixd.errors import FetchError
from guixd.net.connections import Connection, Connections, Exchange, Way, request_bytes
from guixd.net.http1 import ResponseHead
from guixd.net.proxies import Proxies
from guixd.net.reach import FARTHEST, Reach
from guixd.net.requests import LONGEST_BODY, Answer
from guixd.net.transfers import REDIRECTS, joined, split_url, without_user

CONNECTIONS = 8
"""To each server."""
STALL = 15.0
"""Seconds without an answer after which a server is taken to be stalled; up to twice as many."""
DEPTH = 32
"""Requests on the way on each connection that has answered one before."""
_TRIES = 3
_MOST_SERVERS = 500
"""So many are known when those with nothing to do are forgotten."""
_MOST_REDIRECTS = 5
_MAX_AGE = re.compile(r"(?:^|[,\s])max-age=([0-9]{1,10})(?:$|[,\s])")


class _Question(Exchange):
    """One URL that is asked for."""

    def __init__(self, url: str, request: bytes, done: Callable[[_Question, Answer], None]) -> None:
        super().__init__(request)
        self.url = url
        self.tries = 0
        self.redirects = 0
        self.done = done
        self._head: ResponseHead | None = None
        self._parts: list[bytes] = []
        self._size = 0

    def head(self, head: ResponseHead) -> None:
        self._head = head

    def data(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > LONGEST_BODY:
            connection = self.connection
            self.failed(FetchError("limit", "the answer is too long"))
            if connection is not None:
                connection.abort()
        else:
            self._parts.append(data)

    def end(self) -> None:
        assert self._head is not None
        age = _MAX_AGE.search(self._head.get("cache-control").lower())
        answer = Answer(
            self._head.status,
            b"".join(self._parts),
            int(age[1]) if age else None,
            baking=self._head.get("x-baking") == "1",
        )
        self.done(self, answer)

    def failed(self, error: FetchError) -> None:
        self.done(self, Answer(0, error.text.encode(), None, error.kind))

    @property
    def location(self) -> str:
        """Where the answer leads to, if it is a redirection."""
        if self._head is None or self._head.status not in REDIRECTS:
            return ""
        return self._head.get("location")


class _Server:
    """The connections to one server, and who waits for them."""

    def __init__(self, lookups: Lookups, way: Way) -> None:
        self._lookups = lookups
        self._way = way
        self._waiting: deque[_Question] = deque()
        self._connections: set[Connection] = set()
        self._opening = 0
        self._answers = 0
        """Of connections that are gone."""
        self._heard: dict[Connection, int] = {}
        """How many answers had come at the last look, on connections that should say something."""
        self._stalled: set[Connection] = set()
        self._relieved: set[Connection] = set()
        """Those that said nothing, and whose questions were taken from them."""
        self._timer: IDelayedCall | None = None

    @property
    def busy(self) -> bool:
        """Whether anybody waits for it, or will."""
        return bool(self._waiting or self._connections or self._opening)

    def ask(self, question: _Question) -> None:
        """Put QUESTION to the server when there is room."""
        self._waiting.append(question)

    def forget(self, question: _Question) -> None:
        """Do not ask QUESTION any more."""
        if question in self._waiting:
            self._waiting.remove(question)

    def pump(self) -> None:
        """Send what can be sent, over as many connections as that needs."""
        for connection in sorted(self._connections, key=lambda each: each.waiting):
            if connection.usable:
                self._fill(connection)
        # One that was kept open is there at once, and pumps, too.
        while (
            len(self._waiting) > self._opening
            and self._opening + len(self._connections) < CONNECTIONS
        ):
            self._opening += 1
            Deferred.fromCoroutine(self._open())

    def _fill(self, connection: Connection) -> None:
        depth = DEPTH if connection.answered else 1
        batch: list[_Question] = []
        # Evenly over the connections, when there is little to do.
        share = -(-len(self._waiting) // CONNECTIONS)
        while self._waiting and connection.waiting + len(batch) < min(depth, max(share, 1)):
            batch.append(self._waiting.popleft())
        if batch:
            connection.send_all(list(batch))
            if self._timer is None:
                self._timer = self._lookups.call_later(STALL, self._look)

    def _look(self) -> None:
        """Give connections up on which no answer came, or not all of it, since the last time."""
        busy = {each: each.answered for each in self._connections if each.waiting}
        stalled = [each for each, count in busy.items() if self._heard.get(each) == count]
        self._heard = busy
        self._timer = self._lookups.call_later(STALL, self._look) if busy else None
        for connection in stalled:
            self._stalled.add(connection)
            connection.abort()

    async def _open(self) -> None:
        connections = self._lookups.connections
        try:
            connection = connections.take(self._way)
            if connection is None:
                timeout = self._lookups.connect_timeout
                connection = await connections.open(self._way, timeout, self._lost, self._idle)
            # It shall never wait for new questions while answers are on the way.
            connection.adopt(self._idle, self._lost, DEPTH // 2)
        except FetchError as error:
            self._opening -= 1
            if not self._connections and not self._opening:
                waiting, self._waiting = self._waiting, deque()
                for question in waiting:
                    question.failed(error)
            return
        self._opening -= 1
        self._connections.add(connection)
        self._idle(connection)

    def _idle(self, connection: Connection) -> None:
        self.pump()
        if connection.waiting == 0 and connection.answered:
            self._relieve()
        if connection.waiting == 0:
            self._connections.discard(connection)
            self._lookups.connections.keep(self._way, connection)

    def _relieve(self) -> None:
        """Let others ask what a silent connection was given, as they have nothing to do.

        A server that accepts but a few connections at a time may not know of it yet.
        """
        for each in self._connections - self._relieved:
            if each.waiting and not each.received:
                self._relieved.add(each)
                each.abort()
                return

    def _lost(self, connection: Connection, exchanges: list[Exchange], error: FetchError) -> None:
        self._connections.discard(connection)
        self._answers += connection.answered
        relieved = connection in self._relieved
        self._relieved.discard(connection)
        if connection in self._stalled:
            self._stalled.discard(connection)
            error = FetchError("timeout", "the server does not answer")
            answers = self._answers or any(each.answered for each in self._connections)
            failing = exchanges[:1] if answers else [*exchanges, *self._waiting]
            exchanges = exchanges[1:] if answers else []
            if not answers:
                self._waiting.clear()
            for exchange in failing:
                exchange.failed(error)
        for exchange in reversed(exchanges):
            assert isinstance(exchange, _Question)
            # A server may close after any answer; only one that never answers is given up.
            exchange.tries += not connection.answered and not relieved
            hopeless = error.kind == "tls" and not connection.answered
            if exchange.tries >= _TRIES or hopeless:
                exchange.failed(error)
            else:
                self._waiting.appendleft(exchange)
        self.pump()


class Lookups:
    """All lookups of the fetcher.

    :ivar connect_timeout: seconds for each address.
    """

    def __init__(self, clock: IReactorTime, connections: Connections, proxies: Proxies) -> None:
        self.connections = connections
        self.call_later = clock.callLater
        self.connect_timeout = 5.0
        self._proxies = proxies
        self._servers: dict[Way, _Server] = {}

    def ask(
        self,
        urls: Sequence[str],
        fields: dict[str, str],
        verify: bool,
        answered: Callable[[int, Answer], None],
        nearest: Reach = Reach.LOOPBACK,
    ) -> Callable[[], None]:
        """Ask for URLS; ANSWERED gets the number of each with its answer.

        :param nearest: what servers must not be nearer than.
        :return: what gives up those without an answer yet.
        """
        asked: dict[_Question, _Server] = {}

        def put(number: int, url: str, redirects: int, nearest: Reach) -> _Server | None:
            def done(question: _Question, answer: Answer) -> None:
                asked.pop(question, None)
                if question.location and question.redirects < _MOST_REDIRECTS:
                    target = joined(question.url, question.location)
                    farther = max(nearest, min(question.reach, FARTHEST))
                    server = put(number, target, question.redirects + 1, farther)
                    if server is not None:
                        server.pump()
                else:
                    answered(number, answer)

            try:
                parts = split_url(url, ("http", "https"))
                way = Way.to(parts, self._proxies.proxy_for(url), verify, nearest)
            except FetchError as error:
                answered(number, Answer(0, error.text.encode(), None, error.kind))
                return None
            question = _Question(without_user(parts), request_bytes(way, parts, fields), done)
            question.redirects = redirects
            server = self._servers.get(way)
            if server is None:
                if len(self._servers) >= _MOST_SERVERS:
                    self._servers = {w: s for w, s in self._servers.items() if s.busy}
                server = self._servers[way] = _Server(self, way)
            server.ask(question)
            asked[question] = server
            return server

        used = [put(number, url, 0, nearest) for number, url in enumerate(urls)]
        for server in {id(server): server for server in used if server is not None}.values():
            server.pump()

        def give_up() -> None:
            for question, server in list(asked.items()):
                server.forget(question)
                question.done = lambda question, answer: None

        return give_up
