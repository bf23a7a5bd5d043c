"""The sockets that clients connect to (spec: options §3; systemd's sd_listen_fds(3))."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import secrets
import socket
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from guixd.errors import BadSetting, GuixdError

DEFAULT_PORT = 44146
BACKLOG = 1024
_FIRST_ACTIVATED = 3
_LONGEST_NAME = 105
_LONGEST_ADDRESS = 107
_MODE = 0o666


class ListenError(GuixdError):
    """An endpoint cannot be listened on."""

    reason = "listen"


@dataclass(frozen=True, slots=True)
class BoundSocket:
    """A listening, non-blocking socket and how to undo it."""

    socket: socket.socket
    description: str
    file: str | None = None
    """The socket's file, if this program made it."""
    inode: tuple[int, int] | None = None

    def close(self) -> None:
        """Close the socket; remove its file unless somebody replaced it."""
        self.socket.close()
        if self.file is None:
            return
        try:
            status = os.lstat(self.file)
            if (status.st_dev, status.st_ino) == self.inode:
                os.unlink(self.file)
        except OSError:
            pass


def open_all(endpoints: Sequence[str], environ: Mapping[str, str]) -> list[BoundSocket]:
    """Return the sockets that were passed by socket activation, else those of ENDPOINTS.

    :raises ListenError, BadSetting: one cannot be had; none stays open.
    """
    sockets = activated(environ, os.getpid())
    if sockets:
        return sockets
    try:
        for endpoint in endpoints:
            sockets += open_endpoint(endpoint)
    except BaseException:
        for bound in sockets:
            bound.close()
        raise
    return sockets


def activated(
    environ: Mapping[str, str], pid: int, first: int = _FIRST_ACTIVATED
) -> list[BoundSocket]:
    """Return the sockets that the service manager opened for process PID.

    :param first: the number of the first passed descriptor.
    """
    try:
        count = int(environ.get("LISTEN_FDS", ""))
        if int(environ.get("LISTEN_PID", "")) != pid:
            return []
    except ValueError:
        return []
    sockets = []
    for number in range(first, first + max(0, count)):
        try:
            passed = socket.socket(fileno=number)
        except OSError as error:
            raise ListenError(
                f"descriptor {number} of LISTEN_FDS is no socket: {error.strerror}"
            ) from None
        os.set_inheritable(number, False)
        passed.setblocking(False)
        sockets.append(BoundSocket(passed, f"passed descriptor {number}"))
    return sockets


def open_endpoint(endpoint: str) -> list[BoundSocket]:
    """Listen on ENDPOINT: a file name that begins with `/`, or HOST[:PORT].

    :raises BadSetting: the endpoint is malformed.
    :raises ListenError: it cannot be listened on.
    """
    if endpoint.startswith("/"):
        return [open_unix(endpoint)]
    return open_tcp(*split_host_port(endpoint))


def split_host_port(endpoint: str) -> tuple[str, int]:
    """Split HOST, HOST:PORT, an IPv6 literal, [LITERAL] or [LITERAL]:PORT.

    :raises BadSetting: no host, or no usable port after the colon.
    """
    host, colon, port = endpoint.rpartition(":")
    if (endpoint.startswith("[") and endpoint.endswith("]")) or not colon or _is_ipv6(endpoint):
        host, colon, port = endpoint, "", ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if not _is_ipv6(host):
            raise BadSetting(f"'{endpoint}': '{host}' is no IPv6 address")
    if not host:
        raise BadSetting(f"'{endpoint}' names no host")
    if not colon:
        return host, DEFAULT_PORT
    if not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise BadSetting(f"'{endpoint}': '{port}' is no port number")
    return host, int(port)


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def open_tcp(host: str, port: int) -> list[BoundSocket]:
    """Listen on every address of HOST; port 0 takes a free one.

    :raises ListenError: the host is unknown, or an address cannot be bound.
    """
    try:
        found = socket.getaddrinfo(
            os.fsencode(host),  # as it is; Python would have other rules for names
            port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_ADDRCONFIG if not _is_ipv6(host) else 0,
        )
    except socket.gaierror as error:
        hint = " (the file name of a socket begins with '/')" if "/" in host else ""
        raise ListenError(f"failed to look up '{host}': {error.strerror}{hint}") from None
    sockets: list[BoundSocket] = []
    unusable = ""
    for family, kind, protocol, _, address in dict.fromkeys(found):
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind(address)
            listening.listen(BACKLOG)
        except OSError as error:
            listening.close()
            unusable = f"cannot listen on '{host}' port {port}: {error.strerror}"
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue
            for bound in sockets:
                bound.close()
            raise ListenError(unusable) from None
        listening.setblocking(False)
        name = listening.getsockname()
        shown = f"[{name[0]}]" if family == socket.AF_INET6 else name[0]
        sockets.append(BoundSocket(listening, f"{shown}:{name[1]}"))
    if not sockets:
        raise ListenError(unusable)
    return sockets


def open_unix(path: str) -> BoundSocket:
    """Listen on a Unix socket at PATH, open to everybody; its directory limits access.

    Missing directories are made.  A socket that nobody serves is replaced,
    anything else is left alone.

    :raises ListenError: the name is taken, too long, or cannot be bound.
    """
    path = "/" + os.path.normpath(path).lstrip("/")
    directory, name = os.path.split(path)
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise ListenError(f"socket name '{path}' is too long")
    try:
        make_directories(directory)
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ListenError(f"cannot make '{directory}': {error.strerror}") from None
    try:
        # Held while the old socket is looked at and replaced, so that of two
        # daemons that start together only one gets the name.
        fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _clear(parent, name, path)
        listening = _bind(parent, name, path)
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        problem = "in use" if error.errno == errno.EWOULDBLOCK else error.strerror
        raise ListenError(f"cannot listen on '{path}': {problem}") from None
    finally:
        os.close(parent)
    return BoundSocket(listening, path, path, (status.st_dev, status.st_ino))


def make_directories(directory: str) -> None:
    """Make DIRECTORY and its missing parents with mode 0755, whatever the umask."""
    missing = []
    while not os.path.isdir(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    for made in reversed(missing):
        os.mkdir(made, 0o755)
        os.chmod(made, 0o755)


def _clear(parent: int, name: str, path: str) -> None:
    """Remove the socket that a dead daemon left."""
    try:
        old = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISSOCK(os.fstat(old).st_mode):
            raise ListenError(f"cannot listen on '{path}': the file there is no socket")
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with probe:
            probe.setblocking(False)
            # EAGAIN: somebody serves it, but its queue is full.
            served = probe.connect_ex(f"/proc/self/fd/{old}") in (0, errno.EAGAIN)
        if served:
            raise ListenError(f"cannot listen on '{path}': in use by a running daemon")
        os.unlink(name, dir_fd=parent)
    finally:
        os.close(old)


def _bind(parent: int, name: str, path: str) -> socket.socket:
    """Bind and listen; the address of a socket has room for 107 bytes only."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        through = f"/proc/self/fd/{parent}/"
        if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
            listening.bind(path)
        elif len(os.fsencode(through + name)) <= _LONGEST_ADDRESS:
            listening.bind(through + name)
        else:
            temporary = f".{secrets.token_hex(8)}"
            listening.bind(through + temporary)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        os.chmod(name, _MODE, dir_fd=parent)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening
