;; Builds that fail, each in its own way: status, and lines for programs.
(load "prelude.scm")

(define (try label . drvs)
  (let-values (((text log) (show-attempt label (map derivation-file-name drvs))))
    (show (string-append label " names the derivation")
          (every (lambda (drv)
                   (->bool (string-contains text (derivation-file-name drv))))
                 drvs))
    (show (string-append label " text") (and (string-contains text "failed") 'failed))
    (show (string-append label " left valid")
          (map (cut valid-path? store <>) (append-map (compose (cut map cdr <>)
                                                                derivation->output-paths)
                                                      drvs)))
    log))

(show "says what the failing builder wrote"
      (->bool (string-contains (try "exit 3" (shell "exit-3" "echo before; exit 3"))
                               "before\n")))
(try "signal" (shell "signal" "kill -9 $$"))
(try "no output" (shell "no-output" "true"))
(try "one output of two"
     (shell "one-of-two" "echo > $out" #:outputs '("out" "other")))
(try "special file" (shell "fifo" "mkfifo $out"))
(try "group writable" (shell "group-writable" "echo > $out; chmod 664 $out"))
(try "no builder" (derivation store "no-builder" (string-append bin "/nosuch") '()
                              #:sources (list tools)))
(try "builder outside" (derivation store "outside" "/bin/sh" '() #:sources (list tools)))
(try "unknown builtin" (derivation store "builtin" "builtin:nosuch" '()))
(try "fixed output"
     (shell "bad-hash" "echo wrong > $out" #:hash-algo 'sha256 #:hash (make-bytevector 32 7)))
(try "fixed output as a tree"
     (shell "bad-tree" "mkdir $out" #:hash-algo 'sha256 #:recursive? #t
            #:hash (make-bytevector 32 8)))
(try "fixed output not a file"
     (shell "bad-kind" "mkdir $out" #:hash-algo 'sha256 #:hash (make-bytevector 32 9)))
(try "fixed output fails"
     (shell "fixed-fails" "exit 1" #:hash-algo 'sha256 #:hash (make-bytevector 32 10)))
(try "forbidden reference"
     (shell "forbidden" (string-append "echo " bin " > $out") #:allowed-references '()))
(try "disallowed reference"
     (shell "disallowed" (string-append "echo " bin " > $out")
            #:disallowed-references (list tools)))
(define broken (shell "broken" "exit 1"))
(try "dependency" (shell "above" "echo > $out" #:inputs (list broken)))

;; keep-going
(define (independent n) (shell (format #f "fine-~a" n) "sleep 0.2; echo > $out"))
(let ((fine (independent 1))
      (other (shell "also-broken" "exit 2")))
  (set! store (connect #:print-build-trace #t #:keep-going? #t #:verbosity 0
                       #:multiplexed-build-output? #t #:max-build-jobs 1))
  (let-values (((result text log)
                (attempt (map derivation-file-name (list broken fine other)))))
    (show "keep going" result)
    (show "keep going built the other" (valid-path? store (out fine)))
    (show "keep going names" (map (lambda (drv)
                                    (->bool (string-contains text (derivation-file-name drv))))
                                  (list broken fine other)))))

(set! store (connect #:print-build-trace #t #:timeout 1 #:verbosity 0
                     #:multiplexed-build-output? #t))
(try "timeout" (shell "timeout" "while true; do echo x; sleep 0.3; done"))
(set! store (connect #:print-build-trace #t #:max-silent-time 1 #:verbosity 0
                     #:multiplexed-build-output? #t))
(try "silence" (shell "silent" "echo once; sleep 100"))
