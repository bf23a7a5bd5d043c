"""Lists of content-addressed mirrors, good and hostile (W16)."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from guixd.build.mirrorcode import BadMirrors, urls
from guixd.formats.hashes import to_base32

DIGEST = bytes(range(32))
USUAL = """(begin (use-modules (guix base16) (guix base32))
 (define (publish host)
   (lambda (file algo hash)
     (string-append "https://" host "/file/" file "/" (symbol->string algo) "/"
                    (bytevector->nix-base32-string hash))))
 (list (publish "a.example") (publish "b.example")
   (lambda (file algo hash)
     (and (eq? algo 'sha256)
          (string-append "https://c.example/" (symbol->string algo) ":"
                         (bytevector->base16-string hash))))
   (lambda (file algo hash) #f)))"""


def found(text: str) -> list[str]:
    return urls(text, "hello-1.tar.gz", "sha256", DIGEST)


class MirrorCodeTest(SynchronousTestCase):
    def test_the_usual_form(self) -> None:
        """W16: a custom text; a procedure that returns false."""
        tail = f"/file/hello-1.tar.gz/sha256/{to_base32(DIGEST)}"
        self.assertEqual(
            found(USUAL),
            [
                f"https://a.example{tail}",
                f"https://b.example{tail}",
                f"https://c.example/sha256:{DIGEST.hex()}",
            ],
        )

    def test_none(self) -> None:
        """W16"""
        self.assertEqual(found("(quote ())"), [])

    def test_older_spellings(self) -> None:
        text = """(begin
          (module-autoload! (current-module) '(guix base32) '(bytevector->base32-string))
          (define hosts '("x" "y"))
          (define ((at host) file algo hash) (string-append host file))
          (map at (append hosts (list "z"))))"""
        self.assertEqual(found(text), [f"{host}hello-1.tar.gz" for host in "xyz"])

    def test_other_forms(self) -> None:
        text = """(list (lambda (f a h)
          (let* ((x (if (memq a '(md5 sha256)) "yes" "no")) (y (string-append x "!")))
            (cond ((equal? f "other") "wrong") ((not #t) "wrong")
                  (else (let ((z y)) (or #f (string-append z (number->string 5)))))))))"""
        self.assertEqual(found(text), ["yes!5"])

    def test_hostile_texts_come_to_an_end(self) -> None:
        """W16: loops, unknown names, huge strings."""
        many = f"(quote ({'1 ' * 100}))"
        doubling = "(define (d s n) (if (eq? n 0) s (d (string-append s s) n)))"
        for text in (
            '(list (lambda (f a h) (system "id")))',
            "(begin (define (loop x) (loop x)) (list (lambda (f a h) (loop f))))",
            "(begin (define (o x) (o (o x))) (list (lambda (f a h) (o f))))",
            f'(begin {doubling} (list (lambda (f a h) (d "aaaaaaaa" 1))))',
            "(begin (define (l x) (l (append x x))) (l (list 1 2)))",
            f'(begin (define s "{"a" * 20_000}") (map (lambda (x) (string-append s s)) {many})'
            " (list (lambda (f a h) f)))",
            "(list (lambda (f a h) 5))",
            "(list (lambda (f a h) a))",
            "(list 5)",
            "(list (lambda (f a) f))",
            "5",
            '(open-file "/etc/passwd" "r")',
            '(__import__ "os")',
            "(string-append.__globals__ 1)",
            "(list " + "(lambda (f a h) f)" * 40 + ")",
            "(" * 5000,
            "(a . b)",
            '"' + "a" * 70_000 + '"',
            '(symbol->string "a")',
            "(lambda f f)",
            "(let loop ((x 1)) x)",
            "(if)",
            "(define)",
            "(define () 1)",
            "()",
        ):
            with self.assertRaises(BadMirrors, msg=text[:60]):
                found(text)
