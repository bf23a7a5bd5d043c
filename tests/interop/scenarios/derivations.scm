;; Registers derivations for the command line tools, and builds none.
(load "prelude.scm")

(define fine (shell "fine" "echo being fine; mkdir $out; echo text > $out/file"))
(define user (shell "user" "ls $fine; echo $fine > $out" #:inputs (list fine)
                    #:env `(("fine" . ,(out fine)))))
(show "fine" (derivation-file-name fine))
(show "fine out" (out fine))
(show "user" (derivation-file-name user))
(show "user out" (out user))
(show "broken" (derivation-file-name (shell "broken" "echo about to fail; exit 7")))
(show "broken too" (derivation-file-name (shell "broken-too" "exit 1")))
(show "endless" (derivation-file-name (shell "endless" "sleep 100")))
