"""The daemon as a program: `twistd guixd` and `python -m guixd` (spec: options §2, §5)."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from typing import Any

from twisted.application.service import IService
from twisted.logger import (
    FilteringLogObserver,
    Logger,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)

from guixd import descriptors
from guixd.errors import GuixdError
from guixd.net.spawning import StartedFetcher
from guixd.service.daemon import GuixdService
from guixd.service.options import Options
from guixd.service.storemount import make_writable
from guixd.settings import Settings

_log = Logger()

__all__ = ["Options", "makeService", "run"]

AHEAD = 2.0
"""Seconds until helpers are started that nobody has needed yet."""
SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread that runs Python lets the reactor go on."""


def makeService(options: Options) -> IService:
    """Return the daemon that OPTIONS ask for, for twistd."""
    return _make(options.settings)


def _make(settings: Settings, ahead: StartedFetcher | None = None) -> GuixdService:
    from twisted.internet import reactor as installed

    reactor: Any = installed
    # Else setting the machine's clock would end builds, or keep them from ending.
    reactor.seconds = time.monotonic
    sys.setswitchinterval(SWITCH_INTERVAL)
    store = settings.directories.store
    try:
        if make_writable(store):
            _log.info("the read-only mount of {store} is writable for this daemon", store=store)
    except OSError as error:
        # Each client will read it, too; perhaps it is mounted anew until then.
        _log.error("cannot make {store} writable: {error}", store=store, error=error)
    service = GuixdService(reactor, settings, ahead=ahead)
    reactor.addSystemEventTrigger("before", "shutdown", _hurry_by_signal, reactor, service)
    reactor.callWhenRunning(_stop_by_hangup, reactor)  # other signals are the reactor's
    reactor.callLater(AHEAD if ahead is None else 0, _start_ahead, service)
    return service


def _start_ahead(service: GuixdService) -> None:
    """Start what takes a while, so that the first client need not wait for it."""
    if service.running:
        try:
            service.daemon.fetcher.start()
        except OSError as error:  # The first download tells, too.
            _log.error("cannot start the process that downloads: {error}", error=error)


def _stop_by_hangup(reactor: Any) -> None:
    signal.signal(signal.SIGHUP, lambda *_: reactor.callFromThread(reactor.stop))


def _hurry_by_signal(reactor: Any, service: GuixdService) -> None:
    """Let signals, after the one that began the stop, end at once what still runs."""
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
        signal.signal(number, lambda *_: reactor.callFromThread(service.hurry))


def run(settings: Settings, ahead: StartedFetcher | None = None) -> int:
    """Run the daemon in the foreground, logging to standard error, until a signal.

    :param ahead: see `GuixdService`.
    :return: the program's exit status.
    """
    from twisted.internet import reactor as installed

    reactor: Any = installed
    os.umask(0o022)
    descriptors.allow_many()
    level = LogLevel.debug if settings.debug else LogLevel.info
    observer = FilteringLogObserver(
        textFileLogObserver(sys.stderr), [LogLevelFilterPredicate(level)]
    )
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)
    service = _make(settings, ahead)
    try:
        service.startService()
    except GuixdError as error:
        print(f"error: {error.text}", file=sys.stderr)
        return 1
    os.chdir("/")
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    # What is there now stays, and looking through it takes 20 ms each time.
    gc.collect()
    gc.freeze()
    reactor.run()
    return 0
