"""Printed data of Scheme (spec: downloads §3)."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from guixd.formats.scheme import BadDatum, Symbol, parse


class SchemeTest(SynchronousTestCase):
    def test_strings(self) -> None:
        """W2: escaped and other characters."""
        self.assertEqual(parse('"http://example.org/ä"'), "http://example.org/ä")
        text = r'"\\ \" \n \t \r \a \0 \x41 \u00e4 \U01F600"'
        self.assertEqual(parse(text), '\\ " \n \t \r \a \0 A ä \U0001f600')

    def test_lists_symbols_and_the_rest(self) -> None:
        text = ' ; a comment\n((gnu "a" "b") (kernel.org) \'x #t #f -12 [1 2])'
        gnu, kernel, quoted, *rest = parse(text)  # type: ignore[misc]
        self.assertEqual(gnu, (Symbol("gnu"), "a", "b"))
        self.assertEqual(kernel, (Symbol("kernel.org"),))
        self.assertEqual(quoted, (Symbol("quote"), Symbol("x")))
        self.assertEqual(rest, [True, False, -12, (1, 2)])

    def test_symbols_are_no_strings(self) -> None:
        self.assertNotEqual(Symbol("a"), "a")
        self.assertNotEqual("a", Symbol("a"))
        self.assertEqual(Symbol("a"), Symbol("a"))

    def test_what_is_refused(self) -> None:
        for text in (
            "",
            "(",
            ")",
            "(]",
            '"',
            '"a',
            "a b",
            "#.(exit)",
            "`(a ,b)",
            r'"\q"',
            r'"\uD800"',
            "(a . b)",
            "#{a}#",
            "(" * 200 + ")" * 200,
            "'",
        ):
            with self.assertRaises(BadDatum, msg=text):
                parse(text)
