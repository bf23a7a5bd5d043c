"""Derivations: text, hashes, output paths, checks."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadDerivation, BadHash, BadName
from guixd.formats.derivation import (
    Derivation,
    HashCache,
    Output,
    check,
    compute_output_paths,
    derivation_name,
    hash_modulo,
    masked_hash,
    parse,
    serialise,
)
from guixd.formats.path import StoreDirectory, StorePath

STORE = StoreDirectory("/gnu/store")
SOURCE = STORE.child("84larwrm54x7v7ysqg0xpax8vpiq2df5-hello.txt")
TEXT = STORE.child("bjfjcd0iwaqp6ckwlrd6qim7hjaa5ngi-hello.txt")
PAYLOAD_SHA256 = "d4e4877bac978b7952f0d544fc52ebff5411d351d129f1f056fa43f11da9af2b"

PAYLOAD = STORE.child("vkn2dkjlnmv4yvazqgz202hf7dcmrb40-payload.drv")
PAYLOAD_TEXT = (
    b'Derive([("out","/gnu/store/azdc0hryslxxbrlrc5g2vkqf75fpb05m-payload","sha256",'
    b'"d4e4877bac978b7952f0d544fc52ebff5411d351d129f1f056fa43f11da9af2b")],[],[],'
    b'"x86_64-linux","builtin:download",[],[("name","payload"),("out",'
    b'"/gnu/store/azdc0hryslxxbrlrc5g2vkqf75fpb05m-payload"),'
    b'("url","\\"http://example.org/payload\\"")])'
)
DEP = STORE.child("dwgfjq2ygi4yayn36kjnvslc5fqb5lhi-dep.drv")
DEP_TEXT = (
    b'Derive([("lib","/gnu/store/zhsx5608fp8nl6gb5cmbhdrxnwyf8ldb-dep-lib","",""),'
    b'("out","/gnu/store/0bkxvy1hyxhx2170k82amxy7ffzpd8ch-dep","","")],[],'
    b'["/gnu/store/84larwrm54x7v7ysqg0xpax8vpiq2df5-hello.txt",'
    b'"/gnu/store/bjfjcd0iwaqp6ckwlrd6qim7hjaa5ngi-hello.txt"],"x86_64-linux",'
    b'"/gnu/store/84larwrm54x7v7ysqg0xpax8vpiq2df5-hello.txt",["-c","x"],'
    b'[("lib","/gnu/store/zhsx5608fp8nl6gb5cmbhdrxnwyf8ldb-dep-lib"),'
    b'("msg","a\\"b\\\\c\\n\\t"),("name","dep"),'
    b'("out","/gnu/store/0bkxvy1hyxhx2170k82amxy7ffzpd8ch-dep")])'
)
TOP = STORE.child("2j9wwvlb4mgnw08kqlclc9d5xb4r8ms7-top.drv")
TOP_TEXT = (
    b'Derive([("out","/gnu/store/bql2j2h8xn7mpkrx1xgvxq0ppxh70qhw-top","","")],'
    b'[("/gnu/store/dwgfjq2ygi4yayn36kjnvslc5fqb5lhi-dep.drv",["lib","out"]),'
    b'("/gnu/store/vkn2dkjlnmv4yvazqgz202hf7dcmrb40-payload.drv",["out"])],'
    b'["/gnu/store/84larwrm54x7v7ysqg0xpax8vpiq2df5-hello.txt"],"x86_64-linux",'
    b'"/gnu/store/84larwrm54x7v7ysqg0xpax8vpiq2df5-hello.txt",["-c","y"],'
    b'[("name","top"),("out","/gnu/store/bql2j2h8xn7mpkrx1xgvxq0ppxh70qhw-top")])'
)
TEXTS = {PAYLOAD: PAYLOAD_TEXT, DEP: DEP_TEXT, TOP: TOP_TEXT}
MODULO = {
    PAYLOAD: "9774f7fb5d9fb2e948915b154ecd68b3f0e80dac1af03ee8300584dbac0543a4",
    DEP: "ba0a080809a0744e80c69c69ca4041c458635044184f03403edd93e9bb4c19ef",
    TOP: "f771ade48ea20346e26b6cb432783a725dacde41fa38d97b1f431ffb426f464a",
}


def read(path: StorePath) -> Derivation:
    return parse(TEXTS[path], STORE)


def no_inputs(path: StorePath) -> bytes:
    raise AssertionError(f"asked for {path}")


def completed(drv: Derivation, name: str) -> Derivation:
    """Give DRV, which has no inputs, the output paths that it should have."""
    paths = compute_output_paths(drv, name, STORE, no_inputs)
    return replace(
        drv,
        outputs={n: replace(o, path=paths[n]) for n, o in drv.outputs.items()},
        environment={**drv.environment, **paths},
    )


def plain(**changes: object) -> Derivation:
    empty = Output(StorePath(""))
    drv = Derivation({"out": empty}, {}, (), "x86_64-linux", "/bin/sh", (), {"name": "plain"})
    return replace(drv, **changes)  # type: ignore[arg-type]


class VectorTests(SynchronousTestCase):
    """D1: known derivations, read, written, hashed and named."""

    def test_round_trip(self) -> None:
        """D1: writing what was read gives the same bytes, which name the file."""
        import hashlib

        for path, text in TEXTS.items():
            drv = parse(text, STORE)
            self.assertEqual(serialise(drv), text)
            self.assertEqual(
                STORE.text_path(path.name, hashlib.sha256(text).digest(), drv.references), path
            )

    def test_values(self) -> None:
        """D1: the parts of the example with escapes and of the one with inputs."""
        dep = read(DEP)
        self.assertEqual(dep.environment["msg"], 'a"b\\c\n\t')
        self.assertEqual(dep.arguments, ("-c", "x"))
        self.assertEqual(dep.sources, (SOURCE, TEXT))
        self.assertEqual(dep.builder, SOURCE)
        self.assertEqual(dep.platform, "x86_64-linux")
        self.assertFalse(dep.has_fixed_outputs)
        self.assertEqual(read(TOP).inputs, {DEP: ("lib", "out"), PAYLOAD: ("out",)})
        payload = read(PAYLOAD)
        self.assertTrue(payload.is_fixed)
        self.assertTrue(payload.has_fixed_outputs)
        self.assertEqual(payload.outputs["out"].hash_algorithm, "sha256")
        self.assertFalse(payload.outputs["out"].is_recursive)
        self.assertEqual(payload.outputs["out"].digest().hex(), PAYLOAD_SHA256)

    def test_hashes(self) -> None:
        """D1: modulo hashes and masked hashes."""
        cache = HashCache(read)
        self.assertEqual({path: cache(path).hex() for path in TEXTS}, MODULO)
        self.assertEqual(
            masked_hash(read(DEP), no_inputs).hex(),
            "412787684b1064477d3e6cca19be104ae4580db2deb9cb2d6c7e76538108a419",
        )
        self.assertEqual(
            masked_hash(read(TOP), cache).hex(),
            "ebbf68f5de0576437aac438d84e94b5ccb5d0eba50ef31b34d1758dc1273a008",
        )

    def test_output_paths(self) -> None:
        """D1: the computed output paths are those in the texts, and the check says so."""
        cache = HashCache(read)
        for path in TEXTS:
            drv = read(path)
            expected = {name: output.path for name, output in drv.outputs.items()}
            self.assertEqual(
                compute_output_paths(drv, derivation_name(path), STORE, cache), expected
            )
            check(drv, path, STORE, cache, drv.references)
        self.assertEqual(
            [p.base for p in read(DEP).output_paths],
            [
                "zhsx5608fp8nl6gb5cmbhdrxnwyf8ldb-dep-lib",
                "0bkxvy1hyxhx2170k82amxy7ffzpd8ch-dep",
            ],
        )


class ParseTests(SynchronousTestCase):
    """What is a derivation and what is not."""

    def assert_rejected(self, text: bytes) -> None:
        error = self.assertRaises(BadDerivation, parse, text, STORE, "X.drv")
        self.assertIn("error parsing derivation 'X.drv'", error.text)

    def test_truncated(self) -> None:
        """D5: a text that ends too early, at any offset, is an error."""
        for text in TEXTS.values():
            for end in range(len(text)):
                self.assert_rejected(text[:end])

    def test_trailing(self) -> None:
        """D5: nothing may follow, not even a newline."""
        for extra in b"\n", b" ", b")", b"x", b'"', b'""':
            self.assert_rejected(TOP_TEXT + extra)

    def test_every_byte_counts(self) -> None:
        """D1: no byte outside a string can be left out or doubled."""
        in_string = False
        for offset in range(len(TOP_TEXT)):
            byte = TOP_TEXT[offset : offset + 1]
            if byte == b'"':
                in_string = not in_string
            if byte == b'"' or not in_string:
                self.assert_rejected(TOP_TEXT[:offset] + TOP_TEXT[offset + 1 :])
                self.assert_rejected(TOP_TEXT[:offset] + byte + TOP_TEXT[offset:])
                self.assert_rejected(TOP_TEXT[:offset] + b" " * (byte != b'"') + b"\0")

    def test_white_space(self) -> None:
        """D1: no blank may stand between the parts."""
        for token in b",", b"[", b"(", b"]", b")":
            self.assert_rejected(TOP_TEXT.replace(token, token + b" ", 1))

    def test_control_characters(self) -> None:
        """D1: NUL is an error; newline, return and tabulator must be escaped."""
        for raw in b"\0", b"\n", b"\r", b"\t":
            self.assert_rejected(DEP_TEXT.replace(b'"-c"', b'"-' + raw + b'"'))

    def test_escapes(self) -> None:
        """D1: an escape that nobody writes is an error."""
        for escape in b"\\a", b"\\0", b"\\'", b"\\x41":
            self.assert_rejected(DEP_TEXT.replace(b'"-c"', b'"' + escape + b'"'))
        self.assert_rejected(DEP_TEXT.replace(b'"-c"', b'"\\"'))
        drv = parse(DEP_TEXT.replace(b'"-c"', b'"\\\\\\\\\\"\\\\n\\n"'), STORE)
        self.assertEqual(drv.arguments[0], '\\\\"\\n\n')

    def test_bad_paths(self) -> None:
        """D1: outputs, inputs and sources must be in the store."""
        for bad in b"", b"x", b"/", b"/gnu/store", b"/gnu/store/", b"/gnu/store/a/b", b"/tmp/x":
            self.assert_rejected(
                b'Derive([],[],["' + bad + b'"],"p","b",[],[])',
            )
            self.assert_rejected(b'Derive([("out","' + bad + b'","","")],[],[],"p","b",[],[])')
            self.assert_rejected(b'Derive([],[("' + bad + b'",["out"])],[],"p","b",[],[])')

    def test_twice(self) -> None:
        """D1: what is said twice has no meaning."""
        self.assert_rejected(b'Derive([],[],[],"p","b",[],[("a","1"),("a","2")])')
        out = b'("out","/gnu/store/a","","")'
        self.assert_rejected(b"Derive([" + out + b"," + out + b'],[],[],"p","b",[],[])')

    def test_order_is_free(self) -> None:
        """D1: hashes are those of the sorted form."""
        text = (
            b'Derive([],[],["/gnu/store/b","/gnu/store/a"],"p","b",["2","1"],[("b","1"),("a","2")])'
        )
        drv = parse(text, STORE)
        self.assertEqual(
            serialise(drv),
            b'Derive([],[],["/gnu/store/a","/gnu/store/b"],"p","b",["2","1"],[("a","2"),("b","1")])',
        )

    def test_sets(self) -> None:
        """D1, D7: outputs of an input, and sources, count once, as the stock daemon has sets."""
        drv = parse(
            b'Derive([],[("/gnu/store/a.drv",["out","dev","out"])],["/gnu/store/b","/gnu/store/b"],'
            b'"p","b",["1","1"],[])',
            STORE,
        )
        self.assertEqual(
            serialise(drv),
            b'Derive([],[("/gnu/store/a.drv",["dev","out"])],["/gnu/store/b"],'
            b'"p","b",["1","1"],[])',
        )

    def test_no_outputs(self) -> None:
        """D8: a derivation without outputs is one."""
        drv = parse(b'Derive([],[],[],"p","b",[],[])', STORE)
        self.assertEqual(drv.outputs, {})
        check(drv, STORE.child("x" * 32 + "-none.drv"), STORE, no_inputs, ())

    def test_large(self) -> None:
        """D5: size is bounded, and time is linear in it."""
        text = b'Derive([],[],[],"p","b",["' + b"\\\\\\n" * 500_000 + b'"],[])'
        self.assertEqual(parse(text, STORE).arguments[0], "\\\n" * 500_000)
        self.assert_rejected(text[:-5])
        many = b'Derive([],[],[],"p","b",[' + b",".join([b'"a"'] * 200_000) + b"],[])"
        self.assertEqual(len(parse(many, STORE).arguments), 200_000)
        self.assert_rejected(many.replace(b'",', b'"', 1))
        self.assert_rejected(b"(" * (64 << 20) + b"(")

    text = st.text(
        alphabet=st.characters(codec="utf-8", exclude_characters="\0")
        | st.sampled_from('"\\\n\r\tnrt,()[]'),
        max_size=12,
    )
    path = st.text(alphabet="abc", min_size=1, max_size=3).map(STORE.child)

    @settings(deadline=None, max_examples=200)
    @given(
        st.dictionaries(text, path, max_size=3),
        st.dictionaries(path, st.sets(text, max_size=3), max_size=3),
        st.sets(path, max_size=3),
        st.lists(text, max_size=3),
        st.dictionaries(text, text, max_size=4),
        text,
    )
    def test_any(
        self,
        outputs: dict[str, StorePath],
        inputs: dict[StorePath, set[str]],
        sources: set[StorePath],
        arguments: list[str],
        environment: dict[str, str],
        word: str,
    ) -> None:
        """D1: what is written is read again, whatever the strings are."""
        drv = Derivation(
            {name: Output(p, word, word) for name, p in outputs.items()},
            {p: tuple(sorted(ids, key=str.encode)) for p, ids in inputs.items()},
            tuple(sorted(sources)),
            word,
            word,
            tuple(arguments),
            environment,
        )
        self.assertEqual(parse(serialise(drv), STORE), drv)

    @settings(deadline=None)
    @given(st.binary(max_size=20).filter(lambda b: not set(b) & set(b'\0\n\r\t"\\')))
    def test_any_bytes(self, word: bytes) -> None:
        """D1: strings need not be UTF-8."""
        text = b'Derive([],[],[],"p","b",["' + word + b'"],[])'
        self.assertEqual(serialise(parse(text, STORE)), text)

    def test_sorted_by_bytes(self) -> None:
        """D1: bytes that are no UTF-8 are sorted as bytes too."""
        names = [b"a", b"\xc3\xa9", b"\xf0\x9f\x90\x82", b"\xff"]
        variables = b",".join(b'("' + name + b'","")' for name in names)
        text = b'Derive([],[],[],"p","b",[],[' + variables + b"])"
        self.assertEqual(serialise(parse(text, STORE)), text)


class CheckTests(SynchronousTestCase):
    """Which derivations may be registered."""

    def rejected(self, drv: Derivation, path: StorePath, text: str) -> None:
        error = self.assertRaises(BadDerivation, check, drv, path, STORE, HashCache(read))
        self.assertIn("incorrect output", error.text)
        self.assertIn(f"should be '{text}", error.text)

    def test_wrong_path(self) -> None:
        """D2: a wrong output path."""
        drv = read(TOP)
        wrong = {"out": replace(drv.outputs["out"], path=SOURCE)}
        self.rejected(replace(drv, outputs=wrong), TOP, drv.outputs["out"].path)

    def test_missing_variable(self) -> None:
        """D2: no variable is named like the output, or it has another value."""
        for path in TOP, PAYLOAD, DEP:
            drv = read(path)
            environment = {k: v for k, v in drv.environment.items() if k != "out"}
            self.rejected(replace(drv, environment=environment), path, drv.outputs["out"].path)
            environment["out"] = SOURCE
            self.rejected(replace(drv, environment=environment), path, drv.outputs["out"].path)

    def test_wrong_name(self) -> None:
        """D2: the name of the file counts."""
        for path in TOP, PAYLOAD:
            self.rejected(read(path), STORE.child(path.hash_part + "-other.drv"), "/gnu/store/")
        self.assertRaises(BadDerivation, check, read(TOP), TEXT, STORE, HashCache(read))

    def test_references(self) -> None:
        """D2: inputs and sources must be among the references."""
        drv = read(TOP)
        for missing in drv.references:
            error = self.assertRaises(
                BadDerivation, check, drv, TOP, STORE, HashCache(read), drv.references - {missing}
            )
            self.assertIn(missing, error.text)
        check(drv, TOP, STORE, HashCache(read), drv.references | {PAYLOAD, SOURCE})

    def fixed(self, algorithm: str, digest: str) -> Derivation:
        drv = plain(outputs={"out": Output(StorePath(""), algorithm, digest)})
        return completed(drv, "plain")

    def test_fixed_hash_forms(self) -> None:
        """D3: unknown algorithm, short hash, no hexadecimal, base 32."""
        path = STORE.child("x" * 32 + "-plain.drv")
        check(self.fixed("sha256", PAYLOAD_SHA256), path, STORE, no_inputs)
        bad = [
            ("sha257", PAYLOAD_SHA256, "unknown hash algorithm"),
            ("r:", PAYLOAD_SHA256, "unknown hash algorithm"),
            ("sha256", PAYLOAD_SHA256[:-2], "invalid SHA256 hash"),
            ("r:sha256", "g" + PAYLOAD_SHA256[1:], "invalid SHA256 hash"),
            ("sha256", "1" * 52, "invalid SHA256 hash"),
            ("md5", PAYLOAD_SHA256, "invalid MD5 hash"),
            ("sha3-256", "12", "invalid SHA3-256 hash"),
        ]
        for algorithm, digest, text in bad:
            drv = plain(outputs={"out": Output(SOURCE, algorithm, digest)})
            error = self.assertRaises(BadHash, check, drv, path, STORE, no_inputs)
            self.assertIn(text, error.text)

    def test_upper_case(self) -> None:
        """D3: upper-case digits do not change the path, but the modulo hash."""
        lower = self.fixed("sha256", PAYLOAD_SHA256)
        upper = self.fixed("sha256", PAYLOAD_SHA256.upper())
        self.assertEqual(upper.output_paths, lower.output_paths)
        check(upper, STORE.child("x" * 32 + "-plain.drv"), STORE, no_inputs)
        self.assertNotEqual(hash_modulo(upper, no_inputs), hash_modulo(lower, no_inputs))

    def test_fixed_kinds(self) -> None:
        """D3: recursive sha256 names the output like a source, others differ."""
        flat = self.fixed("sha256", PAYLOAD_SHA256).output_paths[0]
        recursive = self.fixed("r:sha256", PAYLOAD_SHA256).output_paths[0]
        self.assertEqual(recursive, STORE.source_path("plain", bytes.fromhex(PAYLOAD_SHA256)))
        self.assertNotEqual(flat, recursive)

    def test_other_name_is_not_fixed(self) -> None:
        """D4: a single output with a hash that is not called `out` is named as any other."""
        foo = {"foo": Output(StorePath(""), "sha256", PAYLOAD_SHA256)}
        drv = completed(plain(outputs=foo), "plain")
        self.assertFalse(drv.is_fixed)
        self.assertTrue(drv.has_fixed_outputs)
        digest = masked_hash(drv, no_inputs)
        self.assertEqual(drv.output_paths, (STORE.output_path("foo", digest, "plain"),))
        check(drv, STORE.child("x" * 32 + "-plain.drv"), STORE, no_inputs)
        both = {**foo, "out": Output(StorePath(""), "sha256", PAYLOAD_SHA256)}
        self.assertFalse(plain(outputs=both).is_fixed)

    def test_bad_names(self) -> None:
        """D2: the name of an output is part of a file name."""
        self.assertRaises(
            BadName,
            compute_output_paths,
            plain(outputs={"a b": Output(SOURCE)}),
            "plain",
            STORE,
            no_inputs,
        )


class ModuloTests(SynchronousTestCase):
    """Hashes of graphs."""

    def test_equal_hashes(self) -> None:
        """D6: of two inputs with one hash, the one whose path is last counts."""
        first, last = STORE.child("a-i.drv"), STORE.child("b-i.drv")
        digest = b"\1" * 32
        both = plain(inputs={last: ("lib",), first: ("out", "doc")})
        only_last = plain(inputs={last: ("lib",)})
        only_first = plain(inputs={first: ("out", "doc")})
        hashes = [masked_hash(drv, lambda _: digest) for drv in (both, only_last, only_first)]
        self.assertEqual(hashes[0], hashes[1])
        self.assertNotEqual(hashes[0], hashes[2])

    def test_fetching_does_not_count(self) -> None:
        """D6: how a fixed input is fetched changes nothing for its users."""
        payload = read(PAYLOAD)
        other = replace(payload, environment={**payload.environment, "url": "elsewhere"})
        self.assertEqual(hash_modulo(payload, no_inputs), hash_modulo(other, no_inputs))

    def test_missing_input(self) -> None:
        """D7: an input that cannot be read is reported as the reader does."""
        self.assertRaises(KeyError, HashCache({}.__getitem__), TOP)

    def test_deep(self) -> None:
        """D7: a chain of thousands is no problem, and each is read once."""
        length = 3_000
        drvs = {
            STORE.child(f"{n}-n.drv"): plain(
                inputs={STORE.child(f"{n - 1}-n.drv"): ("out",)} if n else {}
            )
            for n in range(length)
        }
        asked = []

        def lookup(path: StorePath) -> Derivation:
            asked.append(path)
            return drvs[path]

        cache = HashCache(lookup)
        top = cache(STORE.child(f"{length - 1}-n.drv"))
        self.assertEqual(len(asked), length)
        below = hash_modulo(drvs[STORE.child("0-n.drv")], no_inputs)
        self.assertEqual(cache(STORE.child("0-n.drv")), below)
        self.assertNotEqual(top, below)
        self.assertEqual(len(asked), length)

    def test_diamond(self) -> None:
        """D7: shared inputs are hashed once, in any order."""
        a, b, c, d = (STORE.child(f"{n}.drv") for n in "abcd")
        drvs = {
            a: plain(inputs={b: ("out",), c: ("out",), d: ("out",)}),
            b: plain(inputs={c: ("out",), d: ("out",)}, builder="b"),
            c: plain(inputs={d: ("out",)}, builder="c"),
            d: plain(builder="d"),
        }
        cache = HashCache(drvs.__getitem__)
        hashes = {d: hash_modulo(drvs[d], no_inputs)}
        for path in c, b, a:
            hashes[path] = hash_modulo(drvs[path], hashes.__getitem__)
        self.assertEqual(cache(a), hashes[a])
        self.assertEqual(cache.known, hashes)

    def test_circle(self) -> None:
        """D7: files that refer to each other, as only a damaged store can have."""
        a, b = STORE.child("a.drv"), STORE.child("b.drv")
        drvs = {a: plain(inputs={b: ("out",)}), b: plain(inputs={a: ("out",)})}
        self.assertRaises(BadDerivation, HashCache(drvs.__getitem__), a)
