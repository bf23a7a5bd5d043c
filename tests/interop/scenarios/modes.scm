;; Registers derivations for `guix build` and shows their names.
(load "prelude.scm")

(define (register name script . rest)
  (show name (derivation-file-name (apply shell name script rest))))

(register "fixed" "echo always the same > $out")
(register "random" "head -c 8 /dev/urandom > $out")
(register "fails" "echo it is written; echo left > left; exit 3")
(register "works" "echo fine > $out")
(register "loops" "while true; do :; done")
(register "silent" "sleep 600")
(register "cores" "echo $NIX_BUILD_CORES > $out")
