;; Builds the tops of a graph: each line of the file GRAPH has a name, an exit status, and
;; the names of earlier nodes that it needs.  With KEEP_GOING set, in spite of failures.
(load "prelude.scm")

(define nodes
  (map string-tokenize
       (remove string-null?
               (string-split (call-with-input-file (string-append work "/graph") get-string-all)
                             #\newline))))

(define (make-node name status inputs)
  (shell name
         (if (string=? status "0")
             (format #f "for i in $inputs; do cat $i; done > $out; echo ~a $inputs >> $out" name)
             (format #f "exit ~a" status))
         #:inputs inputs
         #:env `(("inputs" . ,(string-join (map out inputs) " ")))))

(define drvs
  (fold (lambda (node known)
          (match node
            ((name status inputs ...)
             (acons name
                    (make-node name status (map (cut assoc-ref known <>) inputs))
                    known))))
        '() nodes))

(define tops
  (remove (lambda (pair)
            (any (lambda (node) (member (car pair) (drop node 2))) nodes))
          drvs))

(set! store (connect #:print-build-trace #t #:verbosity 0
                     #:max-build-jobs (string->number (getenv "JOBS"))
                     #:keep-going? (string=? (getenv "KEEP_GOING") "yes")))
(let-values (((result text log) (attempt (map (compose derivation-file-name cdr) tops))))
  (show "result" result)
  (show "failed" (filter-map (match-lambda
                               ((name . drv)
                                (and (string-contains text (derivation-file-name drv)) name)))
                             tops)))
(define valid (filter (compose (cut valid-path? store <>) out cdr) drvs))
(show "valid" (map car valid))
(show "registered" (map (compose info out cdr) valid))
