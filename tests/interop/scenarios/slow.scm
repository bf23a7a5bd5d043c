;; Builds one derivation that takes SECONDS, and lets its output through as it comes.
(load "prelude.scm")
(setvbuf (current-output-port) 'none)

(define slow
  (shell "slow" (string-append "echo begun; sleep " (getenv "SECONDS") "; echo ended; "
                               "cat /proc/sys/kernel/random/uuid > $out")))
(format #t "drv: ~s~%" (derivation-file-name slow))
(parameterize ((current-build-output-port (current-output-port)))
  (build-things store (list (derivation-file-name slow))))
(newline)
(show "out" (out slow))
(show "contents" (contents (out slow)))
