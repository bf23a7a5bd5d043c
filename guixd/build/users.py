"""The build users: who a builder runs as, and waiting for a free one (spec: sandbox §2).

A uid serves one build at a time.  A lock file per uid keeps that true when
another daemon uses the same state directory.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from guixd.errors import GuixdError, StoreError
from guixd.settings import Settings, UidRange
from guixd.store.locks import FileLock

_log = Logger()

RETRY = 1.0
"""Seconds until users that another process holds are tried again."""
REST = 0.2
"""Seconds for which a user known to have no process is kept for the next build."""


@dataclass(frozen=True, slots=True)
class BuildUser:
    """An account that builders run as; `gid` is that of the build group."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class UsersError(GuixdError):
    """The build users are not set up so that one could be used."""

    reason = "build-users"


def group_members(group: str) -> tuple[BuildUser, ...]:
    """Return the accounts listed as members of GROUP, in that order.

    :raises UsersError: no such group, no member, or a member without an account.
    """
    try:
        entry = grp.getgrnam(group)
    except KeyError:
        raise UsersError(
            f"the group '{group}' of the build users does not exist; create it with users in it,"
            " or let the daemon use '--build-uids'"
        ) from None
    users = []
    for name in entry.gr_mem:
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            raise UsersError(
                f"the user '{name}' in the group '{group}' of the build users does not exist"
            ) from None
        groups = tuple(os.getgrouplist(name, account.pw_gid))
        users.append(BuildUser(name, account.pw_uid, entry.gr_gid, groups))
    if not users:
        raise UsersError(
            f"the group '{group}' of the build users has no members; 'usermod --append --groups"
            f" {group} USER' adds one"
        )
    return tuple(users)


def range_members(uids: UidRange) -> tuple[BuildUser, ...]:
    """Return a user for each id of UIDS; none needs an entry in any file.

    :raises UsersError: the range is empty.
    """
    if uids.count < 1:
        raise UsersError("the range of build user ids is empty")
    return tuple(
        BuildUser(f"uid{uid}", uid, uids.gid, (uids.gid,))
        for uid in range(uids.first, uids.first + uids.count)
    )


class _Accounts:
    """The members of a group, looked up again when the account files change."""

    _FILES = ("/etc/passwd", "/etc/group")

    def __init__(self, group: str) -> None:
        self._group = group
        self._seen: object = None
        self._users: tuple[BuildUser, ...] = ()

    def __call__(self) -> tuple[BuildUser, ...]:
        seen = [(s.st_ino, s.st_mtime_ns) for s in map(os.stat, self._FILES)]
        if seen != self._seen:
            self._users = group_members(self._group)
            self._seen = seen
        return self._users


class BuildUserPool:
    """Hands out build users, first come first served.

    :param members: returns the users there are; asked at each request.
    :param directory: of the lock files, `STATE/userpool`.
    """

    def __init__(
        self, clock: IReactorTime, directory: str, members: Callable[[], tuple[BuildUser, ...]]
    ) -> None:
        self._clock = clock
        self._directory = directory
        self._members = members
        self._waiting: deque[Deferred[BuildUser]] = deque()
        self._held: dict[int, FileLock] = {}
        self._resting: dict[int, FileLock] = {}
        self._clean: set[int] = set()
        self._tired: IDelayedCall | None = None
        self._retry: IDelayedCall | None = None

    @property
    def size(self) -> int:
        """How many users there are; 0 when they are not set up rightly."""
        try:
            return len(self._members())
        except GuixdError:
            return 0

    def acquire(self) -> Deferred[BuildUser]:
        """Wait for a user nobody else has; cancel the Deferred to give up.

        It fails with `UsersError` if the users are not set up rightly.
        """
        waiter: Deferred[BuildUser] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        self._serve()
        return waiter

    def is_clean(self, user: BuildUser) -> bool:
        """Whether USER, just acquired, is known to have no process."""
        return user.uid in self._clean

    def release(self, user: BuildUser, *, clean: bool = False) -> None:
        """Give USER back; nothing may run under its uid any more.

        :param clean: whether that is certain, as `ILauncher.kill_user` or the end of a pid
            namespace makes it.
        """
        lock = self._held.pop(user.uid)
        self._clean.discard(user.uid)
        if clean:
            # Its lock is not given up, so that nobody else starts something meanwhile.
            self._resting[user.uid] = lock
            if self._tired is None:
                self._tired = self._clock.callLater(REST, self._give_up_resting)
        else:
            lock.close()
        self._serve()

    def _give_up_resting(self) -> None:
        self._tired = None
        while self._resting:
            self._resting.popitem()[1].close()

    def _serve(self) -> None:
        while self._waiting:
            try:
                user = self._take()
            except (GuixdError, OSError) as error:
                text = str(error) if isinstance(error, GuixdError) else f"build users: {error}"
                self._waiting.popleft().errback(UsersError(text))
                continue
            if user is None:
                break
            self._waiting.popleft().callback(user)

    def _take(self) -> BuildUser | None:
        own = (os.getuid(), os.geteuid())
        foreign = False
        users = self._members()
        for user in users:
            if user.uid in self._resting:
                self._held[user.uid] = self._resting.pop(user.uid)
                self._clean.add(user.uid)
                return user
        for user in users:
            if user.uid in self._held:
                continue
            if user.uid in own:
                raise UsersError(f"the build user '{user.name}' must not be the daemon's own user")
            lock = FileLock(f"{self._directory}/{user.uid}")
            if self._lock(lock):
                self._held[user.uid] = lock
                return user
            lock.close()
            foreign = True
        if foreign and (self._retry is None or not self._retry.active()):
            _log.info("waiting for build users that another process holds")
            self._retry = self._clock.callLater(RETRY, self._serve)
        return None

    def _lock(self, lock: FileLock) -> bool:
        try:
            return lock.acquire(exclusive=True)
        except StoreError:
            os.makedirs(self._directory, mode=0o755, exist_ok=True)
            return lock.acquire(exclusive=True)

    def stop(self) -> None:
        """Forget the timers; used when the daemon ends."""
        if self._retry is not None and self._retry.active():
            self._retry.cancel()
        if self._tired is not None:
            self._tired.cancel()
            self._give_up_resting()


def pool_of(settings: Settings, clock: IReactorTime) -> BuildUserPool | None:
    """Return the pool that SETTINGS ask for; `None` if builders run as the daemon's user."""
    directory = settings.directories.state + "/userpool"
    if settings.build_users_group is not None:
        return BuildUserPool(clock, directory, _Accounts(settings.build_users_group))
    if settings.build_uids is not None:
        users = range_members(settings.build_uids)
        return BuildUserPool(clock, directory, lambda: users)
    return None
