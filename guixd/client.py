"""An asynchronous client of the daemon, for programs that use Twisted.

    client = await connect(UNIXClientEndpoint(reactor, "/var/guix/daemon-socket/socket"))
    path = await client.add_text("hello.txt", b"Hello, store!\\n")
    await client.build_paths([derivation])

Every method returns a Deferred.  Requests are carried out one after the other,
in the order of the calls.  To cancel one closes the connection, as the
protocol has no other way.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IPushProducer, IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from guixd.errors import GuixdError, ProtocolError
from guixd.formats import nar, wire
from guixd.formats import operations as op
from guixd.formats.messages import (
    ClientHandshake,
    Failed,
    Greeting,
    Last,
    MessageReader,
    Next,
    Read,
    Write,
)
from guixd.formats.path import StoreDirectory, StorePath
from guixd.formats.wire import MORE, Reader, Source, encode_bytes

R = TypeVar("R")

NO_LIMIT = 2**64 - 1
"""Collect as much as there is."""


class RequestFailed(GuixdError):
    """The daemon says that a request failed; `status` is 100 or 101 for builds."""

    reason = "request-failed"

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Disconnected(GuixdError):
    """The connection ended before the daemon answered."""

    reason = "disconnected"


def _ignore(data: bytes) -> None:
    pass


def failure_of(error: BaseException | None = None) -> Failure:
    """Return ERROR, or what is being handled, as Twisted wants it."""
    return Failure(error)  # type: ignore[no-untyped-call]


class _Call:
    """The request that is being carried out."""

    __slots__ = ("done", "input", "left_over", "reader", "replying", "sink")

    def __init__(
        self,
        reader: Reader[Any],
        given: Iterable[bytes] = (),
        sink: Callable[[bytes], None] = _ignore,
    ) -> None:
        self.done: Deferred[Any] = Deferred()
        self.reader = reader
        self.replying = False
        self.input: Iterator[bytes] = iter(given)
        self.left_over = b""
        self.sink = sink

    def next_input(self, size: int) -> bytes:
        """Return up to SIZE bytes of the input, none at its end."""
        data = self.left_over
        while not data:
            chunk = next(self.input, None)
            if chunk is None:
                return b""
            data = chunk
        self.left_over = data[size:]
        return data[:size]


@implementer(IPushProducer)
class _Wire(Protocol):
    """The connection: decodes messages and hands them to the call they belong to."""

    transport: Any

    def __init__(self, store: StoreDirectory, log: Callable[[bytes], None]) -> None:
        self.log = log
        self.version = 0
        self.greeted: Deferred[None] = Deferred(lambda greeted: self.abandon())
        self.lost = False
        self.closing: list[Deferred[None]] = []
        self.over: Failure | None = None
        self.call: _Call | None = None
        self.store = store
        self._source = Source(store)
        self._handshake: ClientHandshake | None = ClientHandshake()
        self._messages = MessageReader()
        self._writable: Deferred[None] | None = None
        self._full = False

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)
        self.transport.write(Greeting().encode())
        greeting = _Call(wire.NOTHING)
        greeting.done.addCallbacks(self._greeted, self._refused)
        self.call = greeting

    def _greeted(self, result: object) -> None:
        self.greeted.callback(None)

    def _refused(self, failure: Failure) -> None:
        self.transport.loseConnection()
        self.greeted.errback(failure)

    def dataReceived(self, data: bytes) -> None:
        self._source.feed(data)
        try:
            while self._step():
                pass
        except Exception:  # noqa: BLE001
            self._end(failure_of())
            self.transport.abortConnection()

    def _step(self) -> bool:
        """Decode one thing; whether there may be more."""
        if self._handshake is not None:
            version = self._handshake.resume(self._source)
            if version is MORE:
                return False
            self.version, self._handshake = version, None
        call = self.call
        if call is None:
            if len(self._source):
                raise ProtocolError("the daemon sent something unasked")
            return False
        if call.replying:
            value = call.reader.resume(self._source)
            if value is MORE:
                return False
            self.call = None
            call.done.callback(value)
            return True
        message = self._messages.resume(self._source)
        if message is MORE:
            return False
        match message:
            case Next(text):
                self.log(text)
            case Last():
                call.replying = True
            case Failed(text, status):
                self.call = None
                call.done.errback(RequestFailed(text, status))
            case Write(written):
                call.sink(written)
            case Read(size):
                self.transport.write(encode_bytes(call.next_input(size)))
        return True

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._end(failure_of(Disconnected(f"the daemon closed the connection: {reason.value}")))
        self.resumeProducing()  # only now, or what is left of a body would be read for nobody
        self.lost = True
        for closed in self.closing:
            closed.callback(None)

    def _end(self, failure: Failure) -> None:
        self.over = self.over or failure
        call, self.call = self.call, None
        if call is not None:
            call.done.errback(failure)

    def abandon(self) -> None:
        """Give the running call up, and with it the connection."""
        self.call = None
        self.transport.abortConnection()

    def close(self) -> Deferred[None]:
        """Disconnect; fires when that is done."""
        closed: Deferred[None] = Deferred()
        if self.lost:
            closed.callback(None)
        else:
            self.closing.append(closed)
            self.transport.unregisterProducer()
            self.transport.loseConnection()
        return closed

    async def writable(self) -> None:
        """Wait until the transport wants more."""
        if self._full:
            self._writable = Deferred()
            await self._writable

    def pauseProducing(self) -> None:
        self._full = True

    def resumeProducing(self) -> None:
        self._full = False
        waiting, self._writable = self._writable, None
        if waiting is not None:
            waiting.callback(None)

    def stopProducing(self) -> None:
        """Do nothing: `connectionLost` follows."""


def nar_of_tree(path: str) -> Iterator[bytes]:
    """Serialise the file, link or directory PATH as it is read, in blocks of 64 KiB at most.

    :raises OSError: something cannot be read.
    :raises GuixdError: a file of another type, or one that shrinks meanwhile.
    """
    yield nar.MAGIC
    root = os.fsencode(path)
    yield from _node(root)
    if not stat.S_ISDIR(os.lstat(root).st_mode):
        return
    levels = [(root, iter(sorted(os.listdir(root))))]
    while levels:
        directory, names = levels[-1]
        name = next(names, None)
        if name is None:
            levels.pop()
            yield nar.CLOSE_ENTRY if levels else nar.CLOSE
            continue
        child = directory + b"/" + name
        yield nar.entry_header(name)
        yield from _node(child)
        if stat.S_ISDIR(os.lstat(child).st_mode):
            levels.append((child, iter(sorted(os.listdir(child)))))
        else:
            yield nar.CLOSE


def _node(path: bytes) -> Iterator[bytes]:
    """Serialise PATH, but of a directory only the beginning."""
    mode = os.lstat(path).st_mode
    if stat.S_ISDIR(mode):
        yield nar.DIRECTORY_HEADER
    elif stat.S_ISLNK(mode):
        yield nar.symlink_node(os.readlink(path))
    elif stat.S_ISREG(mode):
        with Path(os.fsdecode(path)).open("rb") as file:
            size = left = os.fstat(file.fileno()).st_size
            yield nar.file_header(size, bool(mode & stat.S_IXUSR))
            while left:
                block = file.read(min(left, 64 * 1024))
                if not block:
                    raise GuixdError(f"file '{os.fsdecode(path)}' has shrunk while it was read")
                left -= len(block)
                yield block
        yield nar.padding(size) + nar.CLOSE
    else:
        raise GuixdError(f"file '{os.fsdecode(path)}' has an unsupported type")


class Client:
    """A connection to a daemon whose handshake is over; made by `connect`.

    Store paths may be given as plain strings.  Every method's Deferred can
    fail with `RequestFailed`, what the daemon answered, and `Disconnected`.
    """

    def __init__(self, connection: _Wire) -> None:
        self._wire = connection
        self._lock = DeferredLock()

    @property
    def version(self) -> int:
        """The daemon's version of the protocol, such as 0x164."""
        return self._wire.version

    @property
    def log(self) -> Callable[[bytes], None]:
        """What is called with each piece of the daemon's log; may be replaced."""
        return self._wire.log

    @log.setter
    def log(self, log: Callable[[bytes], None]) -> None:
        self._wire.log = log

    def call(
        self,
        operation: op.Operation[R],
        *,
        body: Iterable[bytes] = (),
        given: Iterable[bytes] = (),
        sink: Callable[[bytes], None] = _ignore,
    ) -> Deferred[R]:
        """Carry out any OPERATION.

        :param body: what follows the request, for op 7.
        :param given: what the daemon reads while it works, for op 27.
        :param sink: gets what the daemon writes, for op 16.
        """
        call = _Call(op.reply_kind(operation.opcode).begin(), given, sink)
        return Deferred.fromCoroutine(self._perform(operation, call, body))

    async def _perform(self, operation: op.Operation[R], call: _Call, body: Iterable[bytes]) -> R:
        await self._lock.acquire()
        wire = self._wire
        try:
            if wire.over is not None:
                raise Disconnected("the connection to the daemon is closed")
            wire.call = call
            wire.transport.write(operation.encode())
            for chunk in body:
                wire.transport.write(chunk)
                await wire.writable()
                if call.done.called:
                    break
            result: R = await call.done
            return result
        finally:
            if wire.call is call:
                wire.abandon()
            self._lock.release()

    def close(self) -> Deferred[None]:
        """Disconnect; fires when that is done."""
        return self._wire.close()

    # Queries.

    def is_valid_path(self, path: str) -> Deferred[bool]:
        """Whether PATH is valid."""
        return self.call(op.IsValidPath(path))

    def valid_paths(self, paths: Iterable[str]) -> Deferred[tuple[StorePath, ...]]:
        """Return those of PATHS that are valid."""
        return self.call(op.QueryValidPaths(self._paths(paths)))

    def all_valid_paths(self) -> Deferred[tuple[StorePath, ...]]:
        """Return all valid paths."""
        return self.call(op.QueryAllValidPaths())

    def path_info(self, path: str) -> Deferred[op.PathInfoReply]:
        """Return what is known of the valid PATH."""
        return self.call(op.QueryPathInfo(self._path(path)))

    def path_hash(self, path: str) -> Deferred[str]:
        """Return the sha256 of the NAR of the valid PATH in hexadecimal."""
        return self.call(op.QueryPathHash(self._path(path)))

    def references(self, path: str) -> Deferred[tuple[StorePath, ...]]:
        """Return what the valid PATH refers to."""
        return self.call(op.QueryReferences(self._path(path)))

    def referrers(self, path: str) -> Deferred[tuple[StorePath, ...]]:
        """Return what refers to PATH."""
        return self.call(op.QueryReferrers(self._path(path)))

    def deriver(self, path: str) -> Deferred[StorePath | None]:
        """Return the derivation that made the valid PATH."""
        return self.call(op.QueryDeriver(self._path(path)))

    def valid_derivers(self, path: str) -> Deferred[tuple[StorePath, ...]]:
        """Return the valid derivations that have PATH as an output."""
        return self.call(op.QueryValidDerivers(self._path(path)))

    def derivation_outputs(self, path: str) -> Deferred[tuple[StorePath, ...]]:
        """Return the outputs of the valid derivation PATH."""
        return self.call(op.QueryDerivationOutputs(self._path(path)))

    def derivation_output_names(self, path: str) -> Deferred[tuple[str, ...]]:
        """Return the names of the outputs of the valid derivation PATH."""
        return self.call(op.QueryDerivationOutputNames(self._path(path)))

    def path_from_hash_part(self, hash_part: str) -> Deferred[StorePath | None]:
        """Return the valid path with the 32 characters HASH_PART."""
        return self.call(op.QueryPathFromHashPart(hash_part))

    def has_substitutes(self, path: str) -> Deferred[bool]:
        """Whether PATH can be substituted."""
        return self.call(op.HasSubstitutes(self._path(path)))

    def substitutable_paths(self, paths: Iterable[str]) -> Deferred[tuple[StorePath, ...]]:
        """Return those of PATHS that can be substituted."""
        return self.call(op.QuerySubstitutablePaths(self._paths(paths)))

    def substitutable_path_info(self, path: str) -> Deferred[op.SubstitutableInfo | None]:
        """Return what substitute servers say of PATH."""
        return self.call(op.QuerySubstitutablePathInfo(path))

    def substitutable_path_infos(
        self, paths: Iterable[str]
    ) -> Deferred[tuple[op.SubstitutablePathInfo, ...]]:
        """Return what substitute servers say of those of PATHS that they know."""
        return self.call(op.QuerySubstitutablePathInfos(self._paths(paths)))

    def substitute_urls(self) -> Deferred[tuple[str, ...]]:
        """Return where substitutes come from."""
        return self.call(op.SubstituteURLs())

    def builtin_builders(self) -> Deferred[tuple[str, ...]]:
        """Return the names of the daemon's own builders."""
        return self.call(op.BuiltinBuilders())

    def failed_paths(self) -> Deferred[tuple[StorePath, ...]]:
        """Return the outputs whose builds are remembered to fail."""
        return self.call(op.QueryFailedPaths())

    def find_roots(self) -> Deferred[tuple[tuple[str, str], ...]]:
        """Return the permanent roots, pairs of link and target."""
        return self.call(op.FindRoots())

    # Adding.

    def add_text(
        self, name: str, text: bytes, references: Iterable[str] = ()
    ) -> Deferred[StorePath]:
        """Add a file NAME with the contents TEXT that refers to REFERENCES."""
        return self.call(op.AddTextToStore(name, text, self._paths(references)))

    def add_nar(
        self,
        name: str,
        archive: Iterable[bytes],
        *,
        recursive: bool = True,
        algorithm: str = "sha256",
    ) -> Deferred[StorePath]:
        """Add what is in ARCHIVE, pieces of a NAR, which are taken as fast as they can be sent.

        :param recursive: hash the archive; else the contents of the only file in it.
        :param algorithm: one of `formats.hashes.ALGORITHMS`.
        """
        return self.call(op.AddToStore(name, True, recursive, algorithm), body=archive)

    def add_tree(
        self, name: str, path: str, *, recursive: bool = True, algorithm: str = "sha256"
    ) -> Deferred[StorePath]:
        """Add the file or directory PATH under NAME, see `add_nar`."""
        return self.add_nar(name, nar_of_tree(path), recursive=recursive, algorithm=algorithm)

    def export_path(
        self, path: str, sink: Callable[[bytes], None], *, sign: bool = True
    ) -> Deferred[None]:
        """Write the valid PATH as an archive to SINK."""
        return self.call(op.ExportPath(self._path(path), sign), sink=sink)

    def import_paths(self, archives: Iterable[bytes]) -> Deferred[tuple[StorePath, ...]]:
        """Import what `export_path` wrote, in pieces of any size."""
        return self.call(op.ImportPaths(), given=archives)

    # Building.

    def set_options(self, options: op.SetOptions) -> Deferred[None]:
        """Set the options of this connection."""
        return self.call(options)

    def build_paths(self, items: Iterable[str], mode: int = 0) -> Deferred[None]:
        """Build derivations or substitute other paths; `X.drv!out,dev` for certain outputs."""
        return self.call(op.BuildPaths(self._paths(items), mode))

    def ensure_path(self, path: str) -> Deferred[None]:
        """Make PATH valid by substituting it."""
        return self.call(op.EnsurePath(self._path(path)))

    def clear_failed_paths(self, paths: Iterable[str]) -> Deferred[None]:
        """Forget that PATHS failed; `*` for all."""
        return self.call(op.ClearFailedPaths(tuple(paths)))

    # Roots and the collector.

    def add_temp_root(self, path: str) -> Deferred[None]:
        """Protect PATH as long as this connection lasts."""
        return self.call(op.AddTempRoot(self._path(path)))

    def add_indirect_root(self, link: str) -> Deferred[None]:
        """Register the symbolic LINK, which lies outside the store, as a root."""
        return self.call(op.AddIndirectRoot(link))

    def sync_with_gc(self) -> Deferred[None]:
        """Wait until no collection runs."""
        return self.call(op.SyncWithGC())

    def collect_garbage(
        self, action: int, paths: Iterable[str] = (), *, max_freed: int = NO_LIMIT
    ) -> Deferred[op.Collected]:
        """Collect garbage.

        :param action: 0 return the live paths, 1 the dead ones, 2 delete the
            dead, 3 delete PATHS.
        :param max_freed: stop when so many bytes are freed.
        """
        return self.call(op.CollectGarbage(action, self._paths(paths), False, max_freed))

    def optimise_store(self) -> Deferred[None]:
        """Deduplicate the store."""
        return self.call(op.OptimiseStore())

    def verify_store(self, *, check_contents: bool = False, repair: bool = False) -> Deferred[bool]:
        """Verify the store; whether errors remain."""
        return self.call(op.VerifyStore(check_contents, repair))

    def _path(self, path: str) -> StorePath:
        return path if isinstance(path, StorePath) else self._wire.store.parse(path)

    def _paths(self, paths: Iterable[str]) -> tuple[StorePath, ...]:
        return tuple(map(self._path, paths))


async def connect(
    endpoint: IStreamClientEndpoint,
    *,
    store: StoreDirectory | None = None,
    log: Callable[[bytes], None] = _ignore,
) -> Client:
    """Connect to the daemon at ENDPOINT.

    :param store: the store directory of the daemon.
    :param log: called with each piece of the daemon's log.
    :raises Disconnected: it closed the connection.
    :raises RequestFailed: it refused us, for instance as it cannot open its store.
    :raises ProtocolError: it is no daemon, or speaks another major version.
    """
    factory = Factory.forProtocol(lambda: _Wire(store or StoreDirectory(), log))
    connection = cast(_Wire, await endpoint.connect(factory))
    await connection.greeted
    return Client(connection)
