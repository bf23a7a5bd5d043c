"""One derivation being built, for all clients that want it (spec: build §4).

It waits for its outputs and a slot, runs an attempt, and tells everybody the
result.  What the builder gets is as the client that came first wants it; each client's
limits of time count for that client.  When the last client leaves, the build is given up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from guixd.build.attempt import Attempt
from guixd.build.broadcast import Broadcast, Follower, Observer
from guixd.build.claims import Claims
from guixd.build.container import is_native
from guixd.build.diskspace import DiskSpace
from guixd.build.durations import Durations
from guixd.build.foreign import released
from guixd.build.job import Job
from guixd.build.patience import Patience
from guixd.build.request import BuildMode, ClientOptions, Level
from guixd.build.results import Result, Status, result_of
from guixd.build.scheduler import Priority, Scheduler, Share, Slot
from guixd.build.verdicts import timed_out
from guixd.build.workshop import Workshop
from guixd.formats.derivation import Derivation
from guixd.formats.path import StorePath
from guixd.formats.trace import BuildTimedOut
from guixd.store.locks import is_locked, lock_file

_log = Logger()


@dataclass(slots=True, eq=False)
class Attachment:
    """A client's part in a shared build.

    :ivar result: fires with the `Result` after all of the log was passed on.
    """

    observer: Observer
    follower: Follower
    options: ClientOptions
    share: Share
    priority: Priority
    changed: Callable[[], None]
    result: Deferred[Result] = field(default_factory=Deferred)
    ticket: Deferred[Slot] | None = None


@dataclass(frozen=True, slots=True)
class Common:
    """What all builds of a daemon share."""

    workshop: Workshop
    scheduler: Scheduler
    claims: Claims
    durations: Durations
    disk: DiskSpace


class SharedBuild:
    """The build of one derivation.

    :ivar ended: fires with None when nothing of it is left.
    """

    def __init__(
        self,
        common: Common,
        path: StorePath,
        drv: Derivation,
        options: ClientOptions,
        mode: BuildMode = BuildMode.NORMAL,
    ) -> None:
        self.path = path
        self.drv = drv
        self._workshop = common.workshop.under(options.settings)
        self.local = mode is not BuildMode.NORMAL or (
            drv.environment.get("preferLocalBuild") == "1"
            and is_native(drv.platform, self._workshop.settings)
        )
        self.rounds = options.rounds
        self._abandoned = False
        self.ended: Deferred[None] = Deferred()
        self._common = common
        self._options = options
        self._mode = mode
        self._attachments: list[Attachment] = []
        self._result: Result | None = None
        self._broadcast = Broadcast(self._workshop.threads, self._hold)
        self._patience = Patience(self._workshop.reactor, self._out_of_patience)
        self._attempt: Attempt | None = None
        self._waiting: Deferred[None] | None = None
        self._awaited: Deferred[Slot] | None = None
        self._slot: Slot | None = None
        self._lacks_disk = False
        self._locked_out = False
        self._told_of_locks = False

    def start(self) -> None:
        """Begin; to be called once, after the first `attach`."""
        Deferred.fromCoroutine(self._run()).addBoth(self._finish)

    # --- clients --------------------------------------------------------------

    def attach(
        self,
        observer: Observer,
        options: ClientOptions,
        share: Share,
        priority: Priority,
        changed: Callable[[], None],
    ) -> Attachment:
        """Let a client take part from now on; it is told all that went before.

        :param options: its limits count for its own part, see `Patience`.
        :param share: a slot of which the build may use.
        :param priority: the place of the build in that share.
        :param changed: called when `stuck` may have changed.
        """
        follower = self._broadcast.follow(observer)
        attachment = Attachment(observer, follower, options, share, priority, changed)
        follower.done.addCallback(lambda _: self._deliver(attachment))
        self._attachments.append(attachment)
        self._patience.join(attachment, options)
        if self._awaited is not None:
            self._queue(attachment)
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """Let a client go; without clients the build is given up."""
        if attachment not in self._attachments:
            return
        self._attachments.remove(attachment)
        self._patience.leave(attachment)
        attachment.follower.leave()
        if attachment.ticket is not None:
            attachment.ticket.cancel()
        if not self._attachments and self._result is None:
            self._give_up()
        elif self._slot is not None and self._attachments and self._slot.share is attachment.share:
            self._common.scheduler.move(self._slot, self._attachments[0].share)
        for other in list(self._attachments):
            other.changed()

    def _give_up(self) -> None:
        self._abandoned = True
        if self._waiting is not None:
            self._waiting.cancel()
        if self._awaited is not None:
            self._awaited.cancel()
        if self._attempt is not None:
            self._attempt.cancel()

    def _deliver(self, attachment: Attachment) -> None:
        if attachment in self._attachments and self._result is not None:
            self._attachments.remove(attachment)
            attachment.result.callback(self._result)

    def _out_of_patience(self, attachment: Attachment, reason: str) -> None:
        """Let a client go whose limits are over, while those of others are not."""
        result = timed_out(self.path, reason).result
        self.detach(attachment)
        attachment.observer.log(Level.ERROR, result.message)
        self._broadcast.recall(attachment.observer, lines=True)
        attachment.observer.trace(BuildTimedOut(self.path).line)
        attachment.result.callback(result)

    def _wishes(self) -> ClientOptions:
        """Return the options that count for the build as a whole.

        Those of the client that came first; but a failed build is kept if anybody still
        here wants that, who then gets it.
        """
        options = (attachment.options for attachment in self._attachments)
        keeper = next((each for each in options if each.keep_failed), None)
        if keeper is None:
            own = self._options
            return replace(own, keep_failed=False) if own.keep_failed else own
        return replace(
            self._options,
            keep_failed=True,
            client_uid=keeper.client_uid,
            client_gid=keeper.client_gid,
        )

    @property
    def is_open(self) -> bool:
        """Whether clients can take part."""
        return not self._abandoned and self._result is None

    @property
    def stuck(self) -> bool:
        """Whether it waits for a slot that none of its clients can ever get."""
        # Who has the locks of the outputs may make them valid.
        lost = self._locked_out and self._common.scheduler.closed
        waits = self._awaited is not None or self._lacks_disk or lost
        return waits and not any(
            attachment.share.may_start(self.local) for attachment in self._attachments
        )

    def _hold(self, on: bool) -> None:
        if self._attempt is not None:
            self._attempt.hold("clients", on)

    # --- its life -----------------------------------------------------------------

    async def _run(self) -> Result:
        while True:
            if not await self._wait_for_disk():
                return Result(Status.MISC_FAILURE, "the build daemon is stopping", general=True)
            result = await self._try()
            self._common.disk.changed()  # What it made on the way is gone.
            if result is not None:
                return result

    async def _wait_for_disk(self) -> bool:
        """Wait, with nothing in hand, until enough of it is free; False if the daemon stops."""
        told = False
        while lack := self._common.disk.lack():
            if self._common.scheduler.closed:
                return False
            if not told:
                told = True
                text = f"the build of `{self.path}' waits for disk space: {lack}"
                self._broadcast.log(Level.ERROR, text)
            self._lacks_disk = True
            await self._wait_idly(self._common.disk.more())
            self._lacks_disk = False
        return True

    async def _try(self) -> Result | None:
        """Build when it is our turn; `None` if there is not enough disk then, or no lock."""
        claims, claimed = self._common.claims, list[StorePath]()
        try:
            for path in sorted(set(self.drv.output_paths)):
                self._waiting = claims.claim(path)
                if self._waiting is not None:
                    await self._waiting
                    self._waiting = None
                claimed.append(path)
            normal = self._mode is BuildMode.NORMAL
            await self._wait_for_locks()
            if normal and self._workshop.all_valid(self.drv):
                return Result(Status.ALREADY_VALID)
            self._slot = await self._wait_for_slot()
            if self._common.disk.lack():
                self._vacate()
                return None
            result = await self._build()
            if result is None:
                self._locked_out = True  # after all: another process was quicker
                self._vacate()
            return result
        finally:
            claims.free(claimed)

    async def _wait_for_locks(self) -> None:
        """Wait, with no slot, until no other process has the lock of an output."""
        files = [lock_file(path) for path in self.drv.output_paths]
        self._locked_out = self._locked_out or any(map(is_locked, files))
        if self._locked_out:
            if not self._told_of_locks:
                self._told_of_locks = True
                text = f"waiting for locks on the outputs of `{self.path}'"
                self._broadcast.log(Level.ERROR, text)
            await self._wait_idly(released(self._workshop.reactor, files))
            self._locked_out = False

    async def _wait_idly(self, event: Deferred[None]) -> None:
        """Wait for EVENT, by which time `stuck` may have changed."""
        self._waiting = event
        for attachment in list(self._attachments):
            attachment.changed()
        await event
        self._waiting = None

    async def _build(self) -> Result | None:
        workshop = self._workshop
        job = Job(self.path, self.drv, self._broadcast, self._patience, self._wishes, self._mode)
        self._attempt = Attempt(workshop, job)
        began = workshop.reactor.seconds()
        result = await self._attempt.run(self._vacate)
        if result is not None and result.status is Status.BUILT:
            seconds = workshop.reactor.seconds() - began
            self._common.durations.note(self.path.name, seconds)
        return result

    def _vacate(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            self._common.scheduler.release(slot)

    def _wait_for_slot(self) -> Deferred[Slot]:
        self._awaited = wait = Deferred[Slot]()
        for attachment in list(self._attachments):
            self._queue(attachment)
        for attachment in list(self._attachments):
            attachment.changed()
        return wait

    def _queue(self, attachment: Attachment) -> None:
        if self._awaited is None:
            return
        ticket = attachment.ticket = attachment.share.acquire(attachment.priority, self.local)
        ticket.addCallbacks(self._granted, lambda failure: failure.trap(CancelledError) and None)

    def _granted(self, slot: Slot) -> None:
        wait, self._awaited = self._awaited, None
        if wait is None:
            self._common.scheduler.release(slot)
            return
        for attachment in self._attachments:
            ticket, attachment.ticket = attachment.ticket, None
            if ticket is not None and not ticket.called:
                ticket.cancel()
        wait.callback(slot)

    def _finish(self, outcome: Result | Failure) -> None:
        if isinstance(outcome, Result):
            self._result = outcome
        elif self._abandoned:
            self._result = Result(Status.MISC_FAILURE, "given up")
        else:
            self._result = result_of(outcome.value or RuntimeError())
            _log.failure("the build of {path} went wrong", outcome, path=self.path)
        self._awaited = None
        self._broadcast.finish()
        # Only now, as who gives up for this result is to begin nothing more.
        self._vacate()
        self.ended.callback(None)
