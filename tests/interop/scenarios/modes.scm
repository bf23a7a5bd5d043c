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
(register "fifo" "mkfifo $out")
(register "paced" "echo begun; sleep 1; echo ended; echo it > $out")
(register "needs" (string-append "echo " (out (shell "works" "echo fine > $out")) " > $out")
  #:inputs (list (shell "works" "echo fine > $out")))
