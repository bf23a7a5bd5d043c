"""NARs, store paths and derivations for the workloads, independent of the daemon's code.

Spec: nar §1, store §2 and §3, derivations §1 and §5.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256

from bench.wire import string, word

MIB = 1 << 20
_ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"


def base32(digest: bytes) -> str:
    number = int.from_bytes(digest, "little")
    length = (len(digest) * 8 + 4) // 5
    return "".join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(length)))


def store_path(store: str, kind: str, digest: str, name: str) -> str:
    """Return the path of an item of KIND whose content has the hex DIGEST."""
    long = sha256(f"{kind}:sha256:{digest}:{store}:{name}".encode()).digest()
    short = bytes(long[i] ^ (long[i + 20] if i + 20 < 32 else 0) for i in range(20))
    return f"{store}/{base32(short)}-{name}"


def text_path(store: str, name: str, text: bytes, references: Iterable[str] = ()) -> str:
    kind = ":".join(["text", *sorted(references)])
    return store_path(store, kind, sha256(text).hexdigest(), name)


def _tokens(*words: str) -> bytes:
    return b"".join(map(string, words))


_FILE = _tokens("(", "type", "regular", "contents")
_PROGRAM = _tokens("(", "type", "regular", "executable", "", "contents")
_END = string(")")
_MAGIC = string("nix-archive-1")


def nar_file(data: bytes, *, executable: bool = False) -> bytes:
    return (_PROGRAM if executable else _FILE) + string(data) + _END


def nar_link(target: str) -> bytes:
    return _tokens("(", "type", "symlink", "target", target, ")")


def nar_directory(entries: Mapping[str, bytes]) -> bytes:
    """Return the node of a directory whose ENTRIES are nodes themselves."""
    parts = [_tokens("(", "type", "directory")]
    for name in sorted(entries):
        parts += [_tokens("entry", "(", "name", name, "node"), entries[name], _END]
    return b"".join([*parts, _END])


def nar(node: bytes) -> bytes:
    return _MAGIC + node


def big_file(mebibytes: int, seed: int) -> Iterator[bytes]:
    """Yield the NAR of one file of MEBIBYTES that is unlike that of other seeds."""
    block = random.Random(7).randbytes(MIB)
    yield _MAGIC + _FILE + word(mebibytes * MIB)
    for index in range(mebibytes):
        yield block if index else seed.to_bytes(8, "little") + block[8:]
    yield _END


def tree(files: int, seed: int) -> bytes:
    """Return the NAR of a tree of FILES: most below 2 KB, a tenth up to 16 KB, half of
    those twins of each other, in directories of 200."""
    source = random.Random(11)
    twins = [source.randbytes(9000 + 16 * n) for n in range(16)]
    directories: dict[str, dict[str, bytes]] = {}
    for index in range(files):
        if index % 20 == 19:
            data = twins[index // 20 % len(twins)]
        elif index % 20 == 9:
            data = source.randbytes(source.randrange(9000, 16000))
        else:
            data = source.randbytes(source.randrange(40, 2000))
        if index == 0:
            data = b"%d" % seed
        directories.setdefault(f"dir-{index // 200:03}", {})[f"file-{index:05}"] = nar_file(data)
    return nar(nar_directory({name: nar_directory(each) for name, each in directories.items()}))


def log_lines(size: int) -> bytes:
    """Return about SIZE bytes that look, and compress, like the log of a compilation."""
    source = random.Random(13)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(source.choices(letters, k=source.randrange(3, 9))) for _ in range(2500)]
    lines, length = [], 0
    while length < size:
        name = "_".join(source.choices(words, k=2))
        line = source.choices(
            (
                f"  CC       src/{name}.o",
                f"gcc -std=gnu11 -I. -I../include -O2 -g -Wall -fPIC -c src/{name}.c "
                f"-o .libs/{name}.o -MMD -MF .deps/{name}.d",
                f"checking whether {name} works... {source.choice(('yes', 'no'))}",
                f"PASS: {name}",
            ),
            (1, 5, 3, 2),
        )[0]
        lines.append(line + "\n")
        length += len(line) + 1
    return "".join(lines).encode()


# A key pair that secures nothing: everybody can read it here.
_CURVE = "(curve Ed25519)"
_PUBLIC = "(q #8E729696EAE580F829554DBD0F58FB0910768D4EA2DFF1B4CEA1F19998342272#)"
_SECRET = "(d #68001A91A96EABA12D22167C70D4411FDC6CEE4E1EF837BB8055DAF24679DD30#)"
PUBLIC_KEY = f"(public-key (ecc {_CURVE} {_PUBLIC}))"
KEYS = {
    "signing-key.pub": PUBLIC_KEY,
    "signing-key.sec": f"(private-key (ecc {_CURVE} {_PUBLIC} {_SECRET}))",
    "acl": f"(acl (entry {PUBLIC_KEY} (tag (guix import))))",
}
"""The files of a configuration directory whose own key is authorized."""


class Derivation:
    """A derivation with one output.

    :ivar path: file name of the derivation; `out` that of its output.
    """

    modulo: str
    path: str

    def __init__(
        self, store: str, name: str, builder: str, arguments: list[str],
        environment: Mapping[str, str], sources: Iterable[str], inputs: Iterable[Derivation] = (),
        sha256_of_file: str = "",
    ) -> None:  # fmt: skip
        """Describe it.

        :param sha256_of_file: hash of the output, if that is a file known beforehand.
        """
        self._hash = sha256_of_file
        self._builder, self._arguments = builder, arguments
        self._environment, self._sources = environment, sorted(sources)
        self.name, self.inputs = name, list(inputs)
        modulo = sorted(each.modulo for each in self.inputs)
        inner = self._text("", modulo)
        if sha256_of_file:
            inner = f"fixed:out:sha256:{sha256_of_file}:".encode()
        self.out = store_path(store, "output:out", sha256(inner).hexdigest(), name)
        self.modulo = sha256(self._text(self.out, modulo)).hexdigest()
        self.text = self._text(self.out, sorted(each.path for each in self.inputs))
        self.references = sorted([*self._sources, *(each.path for each in self.inputs)])
        self.path = text_path(store, name + ".drv", self.text, self.references)

    def _text(self, out: str, inputs: list[str]) -> bytes:
        def quote(value: str) -> str:
            for plain, escaped in ("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"):
                value = value.replace(plain, escaped)
            return f'"{value}"'

        def several(values: Iterable[str]) -> str:
            return f"[{','.join(values)}]"

        environment = sorted({**self._environment, "out": out}.items())
        fields = [
            f'[("out",{quote(out)},"{"sha256" if self._hash else ""}","{self._hash}")]',
            several(f'({quote(each)},["out"])' for each in inputs),
            several(map(quote, self._sources)),
            '"x86_64-linux"',
            quote(self._builder),
            several(map(quote, self._arguments)),
            several(f"({quote(name)},{quote(value)})" for name, value in environment),
        ]
        return f"Derive({','.join(fields)})".encode()
