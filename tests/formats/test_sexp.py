"""S-expressions: what is read, and that they are printed as libgcrypt does."""

from __future__ import annotations

import ctypes

from hypothesis import assume, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadExpression
from guixd.formats import sexp
from guixd.formats.sexp import Expression, canonical, parse, pretty
from guixd.signatures import gcrypt

_ADVANCED = 3
# What decides how an atom is printed, and anything else.
_odd = st.text("a1.-\0\"\\' \n\x1f\x7f\x80\xa0\xa1\xff(#|", min_size=1, max_size=4)
atoms = st.binary(min_size=1, max_size=40) | _odd.map(lambda text: text.encode("latin-1"))
expressions: st.SearchStrategy[Expression] = st.recursive(
    st.lists(atoms, max_size=3).map(tuple),
    lambda inner: st.lists(atoms | inner, max_size=4).map(tuple),
    max_leaves=12,
)


def printed_by_library(expression: Expression) -> bytes:
    library = gcrypt._library()
    with gcrypt._object(expression) as handle:
        buffer = ctypes.create_string_buffer(1 << 16)
        size = library.gcry_sexp_sprint(handle, _ADVANCED, buffer, len(buffer))
        return buffer.raw[:size]


def _has_unreadable_token(expression: Expression) -> bool:
    return any(
        sexp._TOKEN_AND_ZEROS.fullmatch(member) and 0 in member
        if isinstance(member, bytes)
        else _has_unreadable_token(member)
        for member in expression
    )


class Printing(SynchronousTestCase):
    @given(expressions)
    def test_as_libgcrypt(self, expression: Expression) -> None:
        """S28: also quoted strings, where libgcrypt prints them."""
        assume(not _has_unreadable_token(expression))
        self.assertEqual(pretty(expression), printed_by_library(expression))

    @given(expressions)
    def test_read_again(self, expression: Expression) -> None:
        self.assertEqual(parse(pretty(expression)), expression)
        self.assertEqual(parse(canonical(expression)), expression)

    def test_token_with_zero(self) -> None:
        """What libgcrypt would print as a token that nobody reads is in hexadecimal."""
        self.assertEqual(pretty((b"x", b"a\0")), b"(x #6100#)\n")

    def test_deep(self) -> None:
        """Printing does not recurse."""
        deep: Expression = ()
        for _ in range(100_000):
            deep = (deep,)
        self.assertEqual(len(canonical(deep)), 200_002)
        while deep:  # or freeing it would recurse deeply
            (deep,) = deep  # type: ignore[assignment]


class Reading(SynchronousTestCase):
    def test_forms_of_atoms(self) -> None:
        """S28: every way to write an atom."""
        for text in (
            b'(a #62 63#)', b'(a "bc")', b"(a |YmM=|)", b"(1:a2:bc)", b"(a bc)", b" ( a\t2:bc\n)\n",
            rb'(a "\x62\143")', b'("a"\r\n"b\\\nc")', b'(#61#"bc")',
        ):  # fmt: skip
            self.assertEqual(parse(text), (b"a", b"bc"), text)
        self.assertEqual(parse(rb'("\b\t\v\n\f\r\"\'\\")'), (b"\b\t\v\n\f\r\"'\\",))
        self.assertEqual(parse(b'("" ## || 0:)'), (b"", b"", b"", b""))
        self.assertEqual(parse(b"(3:)((()())"), (b")((", (), ()))
        self.assertEqual(
            parse(b'("\xe9" curve.-/_:*+= Ed25519)')[1:], (b"curve.-/_:*+=", b"Ed25519")
        )

    def test_refused(self) -> None:
        for text in (
            b"", b"a", b"#61#", b"(", b")", b"(a", b"(a))", b"(a)(b)", b"(a) b", b"(#6#)",
            b"(#6g#)",
            b'("a)', b"(#61)", b"(|YmM)", b"(|Y|)", b"(5:ab)", b"(99999999999:ab)",
            b"(1a)", b"(01:a)", b'("\\q")', b'("\\777")', b'("\\x6")', b"(a [b] c)", b"{YmM=}",
            b"(a\0b)", b"(\xe9)",
        ):  # fmt: skip
            with self.assertRaises(BadExpression, msg=text):
                parse(text)

    def test_limits(self) -> None:
        deepest = b"(" * sexp.MAX_DEPTH + b")" * sexp.MAX_DEPTH
        parse(deepest)
        with self.assertRaises(BadExpression):
            parse(b"(" + deepest + b")")
        with self.assertRaises(BadExpression):
            parse(b"(" * 500_000)
        parse(b"(abcdefgh)", max_size=10)
        with self.assertRaises(BadExpression):
            parse(b"(abcdefghi)", max_size=10)

    def test_hostile_strings(self) -> None:
        """A string without an end costs no more than its length."""
        for text in b'("' + b"\\\\" * 400_000, b'("' + b"a" * 900_000, b"(#" + b" 6" * 400_000:
            with self.assertRaises(BadExpression):
                parse(text)

    @given(st.binary(max_size=60) | st.text('()#"|\\:1a \n', max_size=40).map(str.encode))
    def test_anything(self, data: bytes) -> None:
        """Whatever comes is an expression, which is printed and read again, or is refused."""
        try:
            expression = parse(data)
        except BadExpression:
            return
        self.assertEqual(parse(canonical(expression)), expression)
