"""What a `builtin:download` is to do, from its derivation, which may say anything."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from guixd.formats.derivation import Derivation, Output
from guixd.formats.path import StoreDirectory
from guixd.formats.scheme import BadDatum, Datum, Symbol, parse
from guixd.store.beneath import open_beneath

METHODS = ("upstream", "content-addressed-mirrors", "internet-archive", "disarchive")
LARGEST_VALUE = 64 << 10
"""Characters of a variable that is read."""
LARGEST_FILE = 1 << 20
"""Bytes of a list of mirrors."""
_FILES = ("mirrors", "content-addressed-mirrors", "disarchive-mirrors")


class Refused(Exception):
    """The derivation asks for something that is not done."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What to download.

    :ivar urls: what the derivation says, `mirror://` URLs among them.
    :ivar files: the lists of mirrors, by the names of their variables.
    """

    output: Output
    urls: tuple[str, ...]
    executable: bool
    methods: tuple[str, ...]
    files: Mapping[str, str]


def read_inputs(drv: Derivation) -> Inputs:
    """Read the environment of DRV; may take a while.

    :raises Refused: there is something wrong with it.
    """
    output = drv.outputs.get("out")
    if output is None or not output.is_fixed or len(drv.outputs) != 1:
        raise Refused("only a derivation with one output whose hash is known can download")
    environment = drv.environment
    if "url" not in environment:
        raise Refused("the derivation has no 'url'")
    executable = environment.get("executable") == "1"
    if executable and not output.is_recursive:
        raise Refused("an executable needs a recursive hash")
    urls = strings(variable(environment, "url"), "url")
    if not urls:
        raise Refused("there is no URL")
    for url in urls:
        check_url(url)
    methods: tuple[str, ...] = METHODS
    if "download-methods" in environment:
        value = variable(environment, "download-methods")
        if not isinstance(value, tuple) or not all(isinstance(name, Symbol) for name in value):
            raise Refused("'download-methods' is no list of names")
        methods = tuple(str(name) for name in value)
    files = {name: environment[name] for name in _FILES if environment.get(name)}
    return Inputs(output, urls, executable, methods, files)


def variable(environment: Mapping[str, str], name: str) -> Datum:
    """Read the value of the variable NAME of ENVIRONMENT.

    :raises Refused: it is no printed datum, or a very long one.
    """
    if len(environment[name]) > LARGEST_VALUE:
        raise Refused(f"'{name}' is longer than {LARGEST_VALUE} characters")
    return datum(environment[name], name)


def datum(text: str, name: str) -> Datum:
    """Read TEXT, which is what NAME says.

    :raises Refused: it is no printed datum.
    """
    try:
        return parse(text)
    except BadDatum as error:
        raise Refused(f"'{name}' is not well-formed: {error}") from None


def strings(value: Datum, name: str) -> tuple[str, ...]:
    """Return the string VALUE, or the strings of the list VALUE.

    :raises Refused: it is neither.
    """
    values = value if isinstance(value, tuple) else (value,)
    found = tuple(each for each in values if isinstance(each, str) and type(each) is str)
    if len(found) != len(values):
        raise Refused(f"'{name}' is no string and no list of strings")
    return found


def check_url(url: str) -> str:
    """Return the scheme of URL, in lower case.

    :raises Refused: it has none, or is about a local file.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError:
        scheme = ""
    if not scheme:
        raise Refused(f"'{masked(url)}' is no URL")
    if scheme == "file":
        raise Refused(f"'{masked(url)}': local files are not downloaded")
    return scheme


def masked(url: str) -> str:
    """Return URL without the password in it, for logs."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(a URL that is not well-formed)"
    user, at, host = parts.netloc.rpartition("@")
    if not at or ":" not in user:
        return url
    netloc = f"{user.partition(':')[0]}:***@{host}"
    return urlunsplit((parts.scheme, netloc, parts.path, parts.query, parts.fragment))


def without_password(url: str) -> str:
    """Return URL without any user information."""
    scheme, _, rest = url.partition("://")
    netloc, slash, path = rest.partition("/")
    return f"{scheme}://{netloc.rpartition('@')[2]}{slash}{path}"


def expand(url: str, mirrors: Datum) -> Sequence[str]:
    """Return the URLs that URL of the form `mirror://KIND/PATH` stands for.

    :raises Refused: the kind is not known, or the list is no list of mirrors.
    """
    parts = urlsplit(url)
    path = url.removeprefix("mirror://").partition("/")[2]
    for entry in mirrors if isinstance(mirrors, tuple) else ():
        if isinstance(entry, tuple) and entry and entry[0] == Symbol(parts.netloc):
            return [f"{base.rstrip('/')}/{path}" for base in strings(entry[1:], "mirrors")]
    raise Refused(f"'{masked(url)}': there are no mirrors of the kind '{parts.netloc}'")


def resolve(store: StoreDirectory, name: str) -> str:
    """Return where in STORE the file NAME is, with all symbolic links followed; blocks.

    :raises Refused: it is somewhere else.
    """
    resolved = os.path.realpath(name)
    prefix = os.path.realpath(store.path) + "/"
    if not resolved.startswith(prefix):
        raise Refused(f"'{name}' is not in the store")
    return resolved.removeprefix(prefix)


def read_beneath(store: StoreDirectory, relative: str, limit: int = LARGEST_FILE) -> str:
    """Return the text of the file RELATIVE in STORE, no part of which is a link; blocks.

    :raises Refused: it is too large or cannot be read.
    """
    try:
        directory = os.open(store.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            descriptor = open_beneath(directory, relative, os.O_RDONLY | os.O_NONBLOCK)
        finally:
            os.close(directory)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(limit + 1)
        text = data.decode()
    except (OSError, ValueError) as error:
        raise Refused(f"'{relative}' cannot be read: {error}") from None
    if len(data) > limit:
        raise Refused(f"'{relative}' is longer than {limit} bytes")
    return text
