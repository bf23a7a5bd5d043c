;; What all scenarios use: a connection, the tools for builders, and SHOW, whose
;; lines are compared between daemons.
(use-modules (guix store) (guix derivations) (guix base32) (guix base16)
             (ice-9 match) (ice-9 rdelim) (ice-9 textual-ports)
             (rnrs bytevectors)
             (srfi srfi-1) (srfi srfi-11) (srfi srfi-26) (srfi srfi-34) (srfi srfi-35))

(define work (getenv "WORK"))

(define (show label value)
  (format #t "~a: ~s~%" label value)
  (force-output))

(define* (connect #:rest options)
  (let ((store (open-connection)))
    (apply set-build-options store #:use-substitutes? #f #:offload? #f options)
    store))

(define store
  (connect #:print-build-trace #t #:multiplexed-build-output? #t #:verbosity 0))

(define tools (add-to-store store "tools" #t "sha256" (string-append work "/tools")))
(define bin (string-append tools "/bin"))

(define* (shell name script #:key (inputs '()) (env '()) (sources '())
                (outputs '("out")) (store store) #:allow-other-keys #:rest rest)
  "A derivation that runs SCRIPT with the shell of the tools."
  (apply derivation store name (string-append bin "/sh") (list "-c" script)
         #:inputs (map (match-lambda
                         ((drv . outputs) (derivation-input drv outputs))
                         (drv (derivation-input drv '("out"))))
                       inputs)
         #:sources (cons tools sources)
         #:outputs outputs
         #:env-vars `(("PATH" . ,bin) ,@env)
         (let strip ((rest rest))
           (match rest
             (((or #:inputs #:env #:sources #:outputs #:store) _ . more) (strip more))
             ((key value . more) (cons* key value (strip more)))
             (() '())))))

(define* (out drv #:optional (output "out"))
  (derivation->output-path drv output))

(define (contents file)
  (call-with-input-file file get-string-all))

;; Lines that only make sense in one run, or only say where a chunk of the log ends.
(define (plain log)
  "LOG without process ids and without the headers of chunks."
  (string-join
   (filter-map (lambda (line)
                 (cond ((string-prefix? "@ build-log " line) #f)
                       ((string-prefix? "@ build-started " line)
                        (string-join (drop-right (string-tokenize line) 1)))
                       (else line)))
               (string-split log #\newline))
   "\n"))

(define* (attempt items #:optional (mode (build-mode normal)) (store store))
  "Build ITEMS.  Return the result, `ok' or the status of the failure; its text; and
what the daemon said meanwhile."
  (let* ((port (open-output-string))
         (text "")
         (result (parameterize ((current-build-output-port port))
                   (guard (c ((store-protocol-error? c)
                              (set! text (store-protocol-error-message c))
                              (store-protocol-error-status c)))
                     (build-things store items mode)
                     'ok))))
    (values result text (get-output-string port))))

(define (traces log)
  "The lines of LOG for programs, without what differs from one run to the next, or
is a text for people."
  (filter-map (lambda (line)
                (match (string-tokenize line)
                  (("@" "build-log" . _) #f)
                  (("@" "build-failed" drv "-" code . _)
                   (list "build-failed" drv code))
                  (("@" "build-started" drv "-" system log pid)
                   (list "build-started" drv system (basename log)
                         (integer? (string->number pid))))
                  (("@" event . rest)
                   (cons event rest))
                  (_ #f)))
              (string-split log #\newline)))

(define* (show-attempt label items #:optional (mode (build-mode normal)))
  (let-values (((result text log) (attempt items mode)))
    (show label result)
    (show (string-append label " traces") (traces log))
    (values text log)))

(define (info path)
  (let ((info (query-path-info store path)))
    (list (path-info-deriver info)
          (bytevector->base16-string (path-info-hash info))
          (path-info-references info)
          (path-info-nar-size info))))
