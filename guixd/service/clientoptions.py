"""The options of one client (spec: protocol §6).

A client sends some options at fixed positions and others as pairs of names and
values.  The pairs are kept as text in a table, as helpers want them; what is
typed is read from the table again each time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from guixd.build.request import ClientOptions
from guixd.errors import BadSetting
from guixd.formats.operations import SetOptions
from guixd.formats.servers import file_name
from guixd.settings import Settings

MOST_SETTINGS = 1024
"""How many different names a session can store."""
_INTEGER = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]{1,20})\Z", re.ASCII)
_EVERYBODY = frozenset(
    {
        "build-timeout",
        "build-max-silent-time",
        "build-max-jobs",
        "build-cores",
        "build-repeat",
        "multiplexed-build-output",
    }
)


def read_integer(name: str, text: str, *, bits: int, signed: bool) -> int:
    """Read TEXT as a C++ stream would: blanks before it, none after it.

    A negative number for an unsigned type wraps around.

    :raises BadSetting: TEXT is no integer or does not fit.
    """
    match = _INTEGER.match(text)
    number = int(match[1]) if match else 0
    limit = 1 << (bits - 1 if signed else bits)
    if not match or abs(number) >= limit:
        raise BadSetting(f"configuration setting '{name}' should have an integer value")
    return number if signed else number % limit


def read_unsigned(name: str, text: str) -> int:
    return read_integer(name, text, bits=32, signed=False)


def _size(name: str, text: str) -> int:
    return read_integer(name, text, bits=64, signed=False)


def _seconds(name: str, text: str) -> int:
    return max(0, read_integer(name, text, bits=64, signed=True))


def _boolean(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise BadSetting(
            f"configuration setting '{name}' should be either 'true' or 'false', not '{text}'"
        )
    return text == "true"


_TYPES: dict[str, Callable[[str, str], int | bool]] = {
    "build-fallback": _boolean,
    "build-max-jobs": read_unsigned,
    "build-cores": read_unsigned,
    "multiplexed-build-output": _boolean,
    "build-max-silent-time": _seconds,
    "build-timeout": _seconds,
    "gc-reserved-space": _size,
    "fsync-metadata": _boolean,
    "use-sqlite-wal": _boolean,
    "sync-before-registering": _boolean,
    "build-use-substitutes": _boolean,
    "build-use-chroot": _boolean,
    "build-impersonate-linux-26": _boolean,
    "build-keep-log": _boolean,
    "build-max-log-size": _size,
    "build-cache-failure": _boolean,
    "build-poll-interval": read_unsigned,
    "gc-check-reachability": _boolean,
    "gc-keep-outputs": _boolean,
    "gc-keep-derivations": _boolean,
    "auto-optimise-store": _boolean,
    "env-keep-derivations": _boolean,
}

_FLAGS = {
    "build-use-chroot": "use_chroot",
    "build-impersonate-linux-26": "impersonate_linux_26",
    "build-keep-log": "keep_log",
    "build-cache-failure": "cache_failures",
    "gc-keep-outputs": "gc_keep_outputs",
    "gc-keep-derivations": "gc_keep_derivations",
}
"""Settings that the trusted change by name, and the fields of `Settings` for them."""
_CHROOT_DIRECTORIES = ("build-chroot-dirs", "build-extra-chroot-dirs")


@dataclass(slots=True)
class SessionOptions:
    """The options of a session as they are now.

    :ivar trusted: whether the client may set what it wants by name.
    :ivar remote: whether it is connected by TCP.
    """

    settings: Settings
    trusted: bool = False
    remote: bool = False
    keep_failed: bool = False
    keep_going: bool = False
    offload: bool = field(default=True)
    verbosity: int = 1
    build_verbosity: int = 0
    log_type: int = 0
    print_trace: bool = False
    table: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.offload = self.settings.offload
        if self.settings.debug:
            self.verbosity = 4

    def apply(self, request: SetOptions) -> list[str]:
        """Take over what REQUEST says; pairs it omits keep their values.

        :return: the user names that a client on TCP gave.
        :raises BadSetting: a value is of the wrong type.
        """
        self.keep_failed = request.keep_failed and not self.remote
        self.keep_going = request.keep_going
        self.verbosity = request.verbosity
        self._store("build-fallback", _text_of(request.try_fallback))
        if request.max_jobs is not None:
            self._store("build-max-jobs", str(request.max_jobs))
        if request.max_silent_time is not None:
            self._store("build-max-silent-time", str(request.max_silent_time))
        if request.use_offload is not None:
            self.offload = request.use_offload
        if request.build_verbosity is not None:
            self.build_verbosity = request.build_verbosity
        if request.log_type is not None:
            self.log_type = request.log_type
        if request.print_build_trace is not None:
            self.print_trace = request.print_build_trace
        if request.build_cores is not None:
            self._store("build-cores", str(request.build_cores))
        if request.use_substitutes is not None and self.use_substitutes:
            self._store("build-use-substitutes", _text_of(request.use_substitutes))
        users = list(self._store_pairs(request.pairs))
        for name, read in _TYPES.items():
            if name in self.table:
                read(name, self.table[name])
        return users

    def _store_pairs(self, pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
        """Store PAIRS by the rules of trust; yield the user names instead."""
        for name, value in pairs:
            if name in _EVERYBODY:
                self._store(name, value)
            elif name == "user-name" and self.remote:
                yield value
            else:
                self._store(name if self.trusted else f"untrusted-{name}", value)

    def _store(self, name: str, value: str) -> None:
        if name not in self.table and len(self.table) >= MOST_SETTINGS:
            raise BadSetting(f"more than {MOST_SETTINGS} settings in one session")
        self.table[name] = value

    def _typed(self, name: str, default: int) -> int:
        text = self.table.get(name)
        return default if text is None else _TYPES[name](name, text)

    @property
    def use_substitutes(self) -> bool:
        """Whether substitutes are wanted; once off, only a trusted name turns them on."""
        return bool(self._typed("build-use-substitutes", self.settings.use_substitutes))

    @property
    def follow_downloads(self) -> bool:
        """Whether the client follows downloads by their traces (spec: downloads §4)."""
        name = "print-extended-build-trace"
        return "1" in (self.table.get(name), self.table.get(f"untrusted-{name}"))

    @property
    def deduplicate(self) -> bool:
        """Whether files that are added or built are shared with equal ones."""
        return bool(self._typed("auto-optimise-store", self.settings.deduplicate))

    @property
    def settles(self) -> bool:
        """Whether replies wait until what was made valid is on disk."""
        return bool(self._typed("sync-before-registering", False))

    @property
    def multiplexed(self) -> bool:
        """Whether builder output is marked with the builder's process id."""
        return bool(self._typed("multiplexed-build-output", False))

    def substitute_urls(self) -> tuple[str, ...]:
        """Return where this client looks for substitutes (spec: protocol §5, op 81)."""
        if not self.use_substitutes:
            return ()
        for name in ("untrusted-substitute-urls", "substitute-urls"):
            urls = self.table.get(name)
            if urls is not None and (urls or name == "substitute-urls"):
                return tuple(urls.split())
        return self.settings.substitute_urls

    @property
    def _servers(self) -> tuple[str, ...]:
        """Where substitutes are looked up: what a client has set, even if it is nothing."""
        text = self.table.get("untrusted-substitute-urls")
        if text is not None:
            refused = self.refused_servers
            return tuple(url for url in text.split() if url not in refused)
        text = self.table.get("substitute-urls")
        return self.settings.substitute_urls if text is None else tuple(text.split())

    @property
    def refused_servers(self) -> tuple[str, ...]:
        """The directories that an untrusted client names as servers, but the daemon does not.

        To read them with the daemon's rights would be more than the client may.
        """
        named = self.table.get("untrusted-substitute-urls", "").split()
        own = {file_name(url) for url in self.settings.substitute_urls}
        directories = {url: file_name(url) for url in named}
        return tuple(url for url, name in directories.items() if name and name not in own)

    @property
    def _discover(self) -> bool:
        """Whether servers in the local network are used (spec: substitutes §1)."""
        text = self.table.get("discover")
        return self.settings.discover if text is None else text == "true"

    def for_builds(self, uid: int | None, gid: int | None) -> ClientOptions:
        """Return the options of a build that the client UID:GID asks for now.

        :raises BadSetting: the number of rounds is no integer.
        """
        repeat = self.table.get("build-repeat")
        if repeat is None:
            rounds = self.settings.rounds
        else:
            rounds = 1 + read_integer("build-repeat", repeat, bits=32, signed=True)
        return ClientOptions(
            keep_failed=self.keep_failed,
            keep_going=self.keep_going,
            fallback=bool(self._typed("build-fallback", False)),
            max_jobs=self._typed("build-max-jobs", self.settings.max_jobs),
            cores=self._typed("build-cores", self.settings.cores),
            timeout=self._typed("build-timeout", self.settings.timeout),
            max_silent_time=self._typed("build-max-silent-time", self.settings.max_silent_time),
            max_log_size=self._typed("build-max-log-size", self.settings.max_log_size),
            rounds=max(1, rounds),
            use_substitutes=self.use_substitutes,
            substitute_urls=self._servers,
            discover=self._discover,
            follow_downloads=self.follow_downloads,
            offload=self.offload,
            deduplicate=self.deduplicate,
            client_uid=uid,
            client_gid=gid,
            settings=self._other_settings(),
        )

    def effective_settings(self) -> Settings:
        """Return the daemon's settings with what a trusted client has set by name."""
        return self._other_settings() or self.settings

    def _other_settings(self) -> Settings | None:
        changes: dict[str, object] = {
            field: self._typed(name, False) for name, field in _FLAGS.items() if name in self.table
        }
        if "system" in self.table:
            changes["system"] = self.table["system"]
        words = [self.table[name] for name in _CHROOT_DIRECTORIES if name in self.table]
        if words:
            changes["chroot_directories"] = self._chroot_directories()
        return replace(self.settings, **changes) if changes else None  # type: ignore[arg-type]

    def _chroot_directories(self) -> tuple[tuple[str, str], ...]:
        """Return pairs of the name inside and the source outside (spec: sandbox §5)."""
        own = self.table.get("build-chroot-dirs", "").split()
        extra = self.table.get("build-extra-chroot-dirs")
        pairs = [] if extra is not None else list(self.settings.chroot_directories)
        for word in [*own, *(extra or "").split()]:
            inside, equals, outside = word.partition("=")
            pair = (inside, outside if equals else inside)
            if not all(name.startswith("/") for name in pair):
                raise BadSetting(f"'{word}' is no absolute file name to have in builds")
            pairs.append(pair)
        return tuple(pairs)


def _text_of(value: bool) -> str:
    return "true" if value else "false"
