;; Two packages that nothing but the tools of the tests makes.
(use-modules (guix packages) (guix build-system) (guix derivations) (guix gexp)
             (guix monads) (guix profiles) (guix store) (ice-9 match))

(define plain
  (build-system
    (name 'plain)
    (description "Run a line of the tools' shell.")
    (lower
     (lambda* (name #:rest _)
       (bag
         (name name)
         (system "x86_64-linux")
         (build
          (lambda* (name inputs #:rest _)
            (mlet* %store-monad
                ((tools (interned-file (string-append (getenv "WORK") "/tools") "tools"
                                       #:recursive? #t)))
              (raw-derivation name (string-append tools "/bin/sh")
                              (list "-c" "echo $name > $out")
                              #:system "x86_64-linux"
                              #:env-vars `(("PATH" . ,(string-append tools "/bin"))
                                           ("name" . ,name))
                              #:sources (list tools))))))))))

(define (simple name)
  (package
    (name name)
    (version "0")
    (source #f)
    (build-system plain)
    (home-page #f)
    (synopsis #f)
    (description #f)
    (license #f)))

(packages->manifest
 (map simple (string-tokenize (or (getenv "PACKAGES") "there missing"))))
