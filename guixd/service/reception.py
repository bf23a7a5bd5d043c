"""How sessions begin, and what their requests are carried out by."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from guixd.errors import Busy
from guixd.formats.messages import Greeting
from guixd.service import (
    adding,
    archives,
    building,
    changes,
    collecting,
    optimising,
    queries,
    substituting,
    verifying,
)
from guixd.service.connection import Connection
from guixd.service.session import Handlers, QuickHandlers, Session, presentable
from guixd.service.shared import STORE_RETRY, Daemon

_log = Logger()

USER_CHECK = 60.0
"""Seconds until a user's profile directory is looked for again."""
HANDLERS: Handlers = {
    **queries.HANDLERS,
    **substituting.HANDLERS,
    **adding.HANDLERS,
    **archives.HANDLERS,
    **building.HANDLERS,
    **changes.HANDLERS,
    **collecting.HANDLERS,
    **optimising.HANDLERS,
    **verifying.HANDLERS,
}
QUICK: QuickHandlers = {**queries.QUICK, **adding.QUICK}


class Reception:
    """Begins the sessions of a daemon's clients."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._users: dict[int, float] = {}

    def session(self, connection: Connection, greeting: Greeting) -> Session | Deferred[Session]:
        """Begin the session of a client whose handshake has come.

        :raises GuixdError: the store cannot be opened.
        """
        try:
            return self._session(connection, greeting)
        except Busy as busy:
            connection.next(f"{busy.text}\n".encode())
            return Deferred.fromCoroutine(self._session_later(connection, greeting))

    async def _session_later(self, connection: Connection, greeting: Greeting) -> Session:
        while True:
            await deferLater(self._daemon.reactor, STORE_RETRY)
            try:
                return self._session(connection, greeting, told=True)
            except Busy:
                pass

    def _session(
        self, connection: Connection, greeting: Greeting, *, told: bool = False
    ) -> Session:
        """Begin a session; TOLD says that the client has got the only line it may get now."""
        try:
            store = self._daemon.open_store(greeting.reserve_space)
            session = Session(self._daemon, store, connection, HANDLERS, QUICK)
            self._daemon.sessions.add(session)
        except OSError as error:
            raise presentable(error) from error
        peer = connection.peer
        if self._daemon.settings.debug:  # otherwise not even the event is made
            _log.debug("accepted connection from {peer}", peer=peer or "TCP")
        if peer is None:
            return session
        now = self._daemon.reactor.seconds()
        if self._users.get(peer.uid, now) <= now:
            self._users[peer.uid] = now + USER_CHECK
            problem = store.ensure_user_directory(peer.uid)
            if problem and not told:
                connection.next(f"{problem}\n".encode("utf-8", "surrogateescape"))
        return session
