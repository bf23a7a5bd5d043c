;; Git commits that the daemon checks out, as (guix git-download) asks for them.
(load "prelude.scm")
(use-modules (guix git-download) (guix monads))

(define (checkout name commit recursive?)
  (run-with-store store
    (git-fetch (git-reference (url (getenv "REPOSITORY")) (commit commit)
                              (recursive? recursive?))
               'sha256 (base16-string->bytevector (getenv "WANTED")) name)))

(define (try label drv)
  (show (string-append label " builder") (derivation-builder drv))
  (show-attempt label (list (derivation-file-name drv)))
  (show (string-append label " content") (contents (string-append (out drv) "/file"))))

(try "commit" (checkout "commit" (getenv "COMMIT") #f))
(try "tag" (checkout "tag" "v1" #t))
