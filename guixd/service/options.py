"""The daemon's command line and environment as `Settings` (spec: options §1, §4)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from twisted.python import usage

from guixd import __version__
from guixd.errors import BadSetting
from guixd.service.clientoptions import read_integer, read_unsigned
from guixd.service.commandline import Option, UsageError, Value, help_lines, parse, usage_lines
from guixd.settings import BuildLimits, Directories, Settings, UidRange

PROGRAM = "guixd"
STOCK_VERSION = "1.5.0"
EXIT_USAGE = 64
DEFAULT_BUILD_GID = 30000
_MOST_BUILD_UIDS = 65536

_required, _optional = Value.REQUIRED, Value.OPTIONAL
OPTIONS: tuple[Option, ...] = (
    Option("system", _required, "SYSTEM", "the system type that is built here"),
    Option("cores", _required, "N", "processors that a build may use, 0 for all", "c"),
    Option("max-jobs", _required, "N", "builds at a time, unless clients ask otherwise", "M"),
    Option("timeout", _required, "SECONDS", "fail builds that take longer, 0 for never"),
    Option("max-silent-time", _required, "SECONDS", "fail builds that are silent for longer"),
    Option("rounds", _required, "N", "build everything N times and compare"),
    Option("disable-chroot", help="build without containers"),
    Option("chroot-directory", _required, "DIR", "show DIR to all builds, or INSIDE=OUTSIDE"),
    Option("build-users-group", _required, "GROUP", "build as the members of GROUP"),
    Option(
        "build-uids", _required, "FIRST-LAST[:GID]",
        "build as these numeric users, which need no entry in any file (guixd only;"
        f" GID is {DEFAULT_BUILD_GID} by default)",
    ),
    Option("no-substitutes", help="build everything here"),
    Option("substitute-urls", _required, "URLS", "where to look for substitutes"),
    Option("no-offload", help="build nothing on other machines"),
    Option("no-build-hook", alias_of="no-offload"),
    Option("discover", _optional, "yes|no", "find substitute servers in the local network"),
    Option("cache-failures", help="remember builds that failed"),
    Option("lose-logs", help="keep no build logs"),
    Option("log-compression", _required, "TYPE", "gzip, bzip2 or none"),
    Option("disable-log-compression"),
    Option("disable-deduplication", help="keep equal files of the store apart"),
    Option("disable-store-optimization", alias_of="disable-deduplication"),
    Option("impersonate-linux-2.6", help="pretend to be an old kernel to builds"),
    Option("isolate-host-loopback", help="hide the host's loopback from downloading builds"),
    Option(
        "refuse-private-hosts",
        help="download what clients name only from public addresses (guixd only)",
    ),
    Option("gc-keep-outputs", _optional, "yes|no", "keep outputs of live derivations"),
    Option("gc-keep-derivations", _optional, "yes|no", "keep derivations of live outputs"),
    Option(
        "build-memory", _required, "SIZE",
        "memory that each build may use, such as 4G (guixd only; needs cgroup v2)",
    ),
    Option(
        "build-processes", _required, "N",
        "processes that each build may have (guixd only; needs cgroup v2)",
    ),
    Option(
        "build-cpu-weight", _required, "N",
        "weight of each build among processes, 1 to 10000, usual is 100 (guixd only; cgroup v2)",
    ),
    Option(
        "min-free-disk", _required, "SIZE",
        "begin builds only when so much disk is free, such as 10G (guixd only)",
    ),
    Option(
        "stop-timeout", _required, "SECONDS",
        "when told to stop, let running builds go on for so long (guixd only)",
    ),
    Option("listen", _required, "ENDPOINT", "a socket's file name, or HOST[:PORT]; repeatable"),
    Option(
        "max-connections-per-user", _required, "N",
        "connections of one user or remote machine, 0 for any number (guixd only)",
    ),
    Option(
        "greeting-timeout", _required, "SECONDS",
        "close connections that do not greet, 0 for never (guixd only)",
    ),
    Option(
        "idle-timeout", _required, "SECONDS",
        "close connections without requests for so long, 0 for never (guixd only)",
    ),
    Option("debug", help="log more"),
    Option("help", help="show this help", short="?"),
    Option("usage", help="show a short usage message"),
    Option("version", help="show the version", short="V"),
)  # fmt: skip


class Information(Exception):
    """The user asked for a text instead of a daemon; the program exits with status 0."""


def help_text() -> str:
    """Return what `--help` shows."""
    return "\n".join(
        [f"Usage: {PROGRAM} OPTION...", "The build daemon of GNU Guix on Twisted.", ""]
        + list(help_lines(OPTIONS))
        + ["", "A value that an option needs may follow '=' or be the next argument."]
    )


def version_text() -> str:
    """Return what `--version` shows."""
    return f"{PROGRAM} {__version__}\ncompatible with guix-daemon (GNU Guix) {STOCK_VERSION}"


def parse_settings(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Return what the command line ARGUMENTS and ENVIRON ask for.

    :raises Information: a text was asked for.
    :raises UsageError: the command line is wrong (status 64).
    :raises BadSetting: a value is wrong (status 1).
    """
    given: list[tuple[str, str]] = []
    for name, value in parse(OPTIONS, arguments):
        if name == "help":
            raise Information(help_text())
        if name == "usage":
            raise Information("\n".join(usage_lines(PROGRAM, OPTIONS)))
        if name == "version":
            raise Information(version_text())
        given.append((name, "yes" if value is None else value))
    chosen: dict[str, Any] = {}
    for name, text in given:  # not before: who asks for help gets it, whatever else is wrong
        _EFFECTS[name](chosen, text)
    if chosen.get("build_uids") is not None and chosen.get("build_users_group") is not None:
        raise BadSetting("--build-uids and --build-users-group cannot be used together")
    return Settings(
        directories=directories(environ),
        ignore_symlink_store=environ.get("NIX_IGNORE_SYMLINK_STORE") == "1",
        **chosen,
    )


def directories(environ: Mapping[str, str]) -> Directories:
    """Return the directories that ENVIRON names.

    :raises BadSetting: one is not an absolute file name.
    """
    default = Directories()
    state = _directory(environ, ("GUIX_STATE_DIRECTORY",), default.state)
    return Directories(
        store=_directory(environ, ("NIX_STORE_DIR", "NIX_STORE"), default.store),
        state=state,
        log=_directory(environ, ("GUIX_LOG_DIRECTORY",), default.log),
        database=_directory(environ, ("GUIX_DATABASE_DIRECTORY",), state + "/db"),
        configuration=_directory(environ, ("GUIX_CONFIGURATION_DIRECTORY",), default.configuration),
        temporary=os.path.realpath(_directory(environ, ("TMPDIR",), default.temporary)),
    )


def _directory(environ: Mapping[str, str], names: Sequence[str], default: str) -> str:
    for name in names:
        value = environ.get(name)
        if value:
            if not value.startswith("/"):
                raise BadSetting(f"{name}: '{value}' is not an absolute path")
            return "/" + os.path.normpath(value).lstrip("/")
    return default


def _number(name: str, text: str) -> int:
    number = read_integer(name, text, bits=64, signed=True)
    if number < 0:
        raise BadSetting(f"option '--{name}' must not be negative")
    return number


def _boolean(name: str, text: str) -> bool:
    known = {"yes": True, "no": False}
    try:
        return known[text.lower()]
    except KeyError:
        raise BadSetting(f"invalid Boolean value '{text}' of option '--{name}'") from None


_Effect = Callable[[dict[str, Any], str], None]


def _flag(field: str, meaning: bool) -> _Effect:
    return lambda chosen, _text: chosen.update({field: meaning})


def _text(field: str) -> _Effect:
    return lambda chosen, text: chosen.update({field: text})


def _integer(name: str, field: str, read: Callable[[str, str], int] = _number) -> _Effect:
    return lambda chosen, text: chosen.update({field: read(name, text)})


def _yes_or_no(name: str, field: str) -> _Effect:
    return lambda chosen, text: chosen.update({field: _boolean(name, text)})


_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = range(2**63)


def _number_with_unit(name: str, text: str) -> int:
    """Read a number of bytes, KiB (`K`), MiB (`M`), GiB (`G`) or TiB (`T`)."""
    digits = text.rstrip("KMGT")
    unit = text[len(digits) :]
    if unit not in _UNITS or not digits:
        raise BadSetting(f"option '--{name}' should be a size such as 500M or 4G")
    number = _number(name, digits) << _UNITS[unit]
    if number not in _SIZE:
        raise BadSetting(f"option '--{name}' is too large")
    return number


def _limit(name: str, field: str, allowed: range) -> _Effect:
    def effect(chosen: dict[str, Any], text: str) -> None:
        number = _number_with_unit(name, text) if allowed is _SIZE else _number(name, text)
        if number not in allowed:
            raise BadSetting(f"option '--{name}' must be less than {allowed.stop}")
        limits = chosen.get("build_limits", BuildLimits())
        chosen["build_limits"] = replace(limits, **{field: number})

    return effect


def _rounds(chosen: dict[str, Any], text: str) -> None:
    try:
        chosen["rounds"] = max(1, _number("rounds", text))
    except BadSetting:
        raise BadSetting(f"invalid number of rounds '{text}'") from None


def _listen(chosen: dict[str, Any], text: str) -> None:
    chosen["listen"] = (*chosen.get("listen", ()), text)


def _chroot_directory(chosen: dict[str, Any], text: str) -> None:
    inside, equals, outside = text.partition("=")
    pair = (inside, outside if equals else inside)
    if not all(name.startswith("/") for name in pair):
        raise BadSetting(f"--chroot-directory: '{text}' is not an absolute path")
    chosen["chroot_directories"] = (*chosen.get("chroot_directories", ()), pair)


def _compression(chosen: dict[str, Any], text: str) -> None:
    if text not in ("gzip", "bzip2", "none"):
        raise BadSetting(f"unknown log compression type '{text}'")
    chosen["log_compression"] = text


def _build_uids(chosen: dict[str, Any], text: str) -> None:
    match = re.fullmatch(r"([0-9]{1,10})-([0-9]{1,10})(?::([0-9]{1,10}))?", text)
    if not match:
        raise BadSetting(f"--build-uids: '{text}' is not of the form FIRST-LAST[:GID]")
    first, last = int(match[1]), int(match[2])
    gid = int(match[3]) if match[3] else DEFAULT_BUILD_GID
    if not 0 < first <= last < 2**32 - 1 or not 0 < gid < 2**32 - 1:
        raise BadSetting(f"--build-uids: '{text}' is no range of ids above 0")
    if last - first >= _MOST_BUILD_UIDS:
        raise BadSetting(f"--build-uids: more than {_MOST_BUILD_UIDS} users")
    chosen["build_uids"] = UidRange(first, last - first + 1, gid)


_EFFECTS: dict[str, _Effect] = {
    "system": _text("system"),
    "cores": _integer("cores", "cores", read_unsigned),
    "max-jobs": _integer("max-jobs", "max_jobs", read_unsigned),
    "timeout": _integer("timeout", "timeout"),
    "max-silent-time": _integer("max-silent-time", "max_silent_time"),
    "rounds": _rounds,
    "disable-chroot": _flag("use_chroot", False),
    "chroot-directory": _chroot_directory,
    "build-users-group": lambda chosen, text: chosen.update(build_users_group=text or None),
    "build-uids": _build_uids,
    "no-substitutes": _flag("use_substitutes", False),
    "substitute-urls": lambda chosen, text: chosen.update(substitute_urls=tuple(text.split())),
    "no-offload": _flag("offload", False),
    "discover": _yes_or_no("discover", "discover"),
    "cache-failures": _flag("cache_failures", True),
    "lose-logs": _flag("keep_log", False),
    "log-compression": _compression,
    "disable-log-compression": lambda chosen, _text: chosen.update(log_compression="none"),
    "disable-deduplication": _flag("deduplicate", False),
    "impersonate-linux-2.6": _flag("impersonate_linux_26", True),
    "isolate-host-loopback": _flag("isolate_host_loopback", True),
    "refuse-private-hosts": _flag("refuse_private_hosts", True),
    "gc-keep-outputs": _yes_or_no("gc-keep-outputs", "gc_keep_outputs"),
    "gc-keep-derivations": _yes_or_no("gc-keep-derivations", "gc_keep_derivations"),
    "listen": _listen,
    "max-connections-per-user": _integer("max-connections-per-user", "max_connections_per_user"),
    "greeting-timeout": _integer("greeting-timeout", "greeting_timeout"),
    "idle-timeout": _integer("idle-timeout", "idle_timeout"),
    "build-memory": _limit("build-memory", "memory", _SIZE),
    "build-processes": _limit("build-processes", "processes", range(2**31)),
    "build-cpu-weight": _limit("build-cpu-weight", "cpu_weight", range(10_001)),
    "min-free-disk": lambda chosen, text: chosen.update(
        min_free_disk=_number_with_unit("min-free-disk", text)
    ),
    "stop-timeout": _integer("stop-timeout", "stop_timeout"),
    "debug": _flag("debug", True),
}


def not_effective(settings: Settings) -> tuple[str, ...]:
    """Name what SETTINGS ask for and this version does not do yet."""
    asked = {
        "offloading": settings.offload,
    }
    return tuple(name for name, wanted in asked.items() if wanted)


def settings_or_exit(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Return the settings, or say what is wrong and end the program (spec: options §5)."""
    try:
        return parse_settings(arguments, environ)
    except Information as text:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # who reads has seen enough; nor is there to be more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        raise SystemExit(0) from None
    except UsageError as error:
        print(f"{PROGRAM}: {error}\nTry '{PROGRAM} --help'.", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
    except BadSetting as error:
        print(f"error: {error.text}", file=sys.stderr)
        raise SystemExit(1) from None


class Options(usage.Options):
    """The same command line for `twistd guixd OPTION...`.

    :ivar settings: what was asked for, once `parseOptions` has run.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.settings = Settings()

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse OPTIONS, by default the program's; may end the program."""
        arguments = sys.argv[1:] if options is None else options
        self.settings = settings_or_exit(arguments, os.environ)

    def __str__(self) -> str:
        return help_text()

    def getUsage(self, width: int | None = None) -> str:
        return help_text()
