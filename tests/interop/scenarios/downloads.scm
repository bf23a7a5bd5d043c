;; Files that the daemon downloads, as (guix download) asks for them.
(load "prelude.scm")
(use-modules (guix download) (guix monads))

(define server (getenv "SERVER"))
(define content "what is wanted\n")
(define wanted (base16-string->bytevector (getenv "WANTED")))

(define* (fetch url #:key (name "file") (hash wanted) (executable? #f))
  (run-with-store store (url-fetch url 'sha256 hash name #:executable? executable?)))

(define (try label drv)
  (show-attempt label (list (derivation-file-name drv)))
  (show (string-append label " valid") (valid-path? store (out drv)))
  (when (valid-path? store (out drv))
    (show (string-append label " content") (contents (out drv)))
    (show (string-append label " mode") (stat:perms (stat (out drv))))))

(define mirrors (plain (contents (assoc-ref (derivation-builder-environment-vars
                                             (fetch (string-append server "/good")))
                                            "content-addressed-mirrors"))))
(show "content-addressed mirrors" mirrors)

(try "one" (fetch (string-append server "/good")))
(try "second of two" (fetch (list (string-append server "/missing")
                                  (string-append server "/good"))
                            #:name "two"))
(try "redirected" (fetch (string-append server "/redirect") #:name "redirected"))
(try "executable" (fetch (string-append server "/good") #:name "program" #:executable? #t
                         #:hash (base16-string->bytevector (getenv "EXECUTABLE"))))
(try "wrong" (fetch (string-append server "/wrong") #:name "wrong"))
(let ((store (connect #:print-build-trace #t #:print-extended-build-trace? #t
                      #:multiplexed-build-output? #t #:verbosity 0)))
  (let-values (((result text log)
                (attempt (list (derivation-file-name
                                (fetch (string-append server "/good") #:name "traced")))
                         (build-mode normal) store)))
    (show "traced" result)
    (show "traced lines"
          (filter (cut string-prefix? "@ download-" <>) (string-split log #\newline)))))
(let ((drv (fetch (string-append server "/good"))))
  (show-attempt "check" (list (derivation-file-name drv)) (build-mode check)))
