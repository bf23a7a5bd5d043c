;; What `record.py` records: one connection for each exchange, in the order of its NAMES.
;; Needs /gnu/store and /var/guix of its own and a daemon without containers.

(use-modules (guix store) (guix derivations) (guix build utils)
             (srfi srfi-34) (rnrs bytevectors))

(define (exchange proc)
  (let ((store (open-connection)))
    (proc store)
    (close-connection store)))

(define-syntax-rule (refused exp)
  (guard (c ((store-protocol-error? c) (pk 'refused (store-protocol-error-message c))))
    exp))

(define tree "/tmp/golden-tree")
(when (file-exists? tree) (delete-file-recursively tree))
(mkdir-p (string-append tree "/sub"))
(call-with-output-file (string-append tree "/file") (lambda (p) (display "contents\n" p)))
(call-with-output-file (string-append tree "/sub/run") (lambda (p) (display "#!/bin/sh\n" p)))
(chmod (string-append tree "/sub/run") #o755)
(symlink "../file" (string-append tree "/sub/link"))

(define hello #f)

(exchange (const #t))                   ;handshake

(exchange (lambda (store)               ;set-options
            (set-build-options store #:keep-failed? #t #:verbosity 2 #:max-build-jobs 3
                               #:timeout 60 #:use-substitutes? #f)))

(exchange (lambda (store)               ;add-text
            (set! hello (add-text-to-store store "hello.txt" "Hello, store!\n"))
            (add-text-to-store store "link.txt" (string-append hello "\n") (list hello))))

(exchange (lambda (store)               ;add-flat
            (add-to-store store "flat" #f "sha256" (string-append tree "/file"))
            (add-to-store store "flat" #f "sha1" (string-append tree "/sub/run"))))

(exchange (lambda (store)               ;add-recursive
            (add-to-store store "tree" #t "sha256" tree)))

(exchange (lambda (store)               ;is-valid
            (valid-path? store hello)
            (valid-path? store (string-append (%store-prefix) "/" (make-string 32 #\a) "-none"))
            (refused (valid-path? store "/tmp/hello.txt"))
            (valid-path? store hello)))

(exchange (lambda (store)               ;queries
            (query-path-info store hello)
            (query-path-hash store hello)
            (references store hello)
            (referrers store hello)
            (valid-derivers store hello)
            (hash-part->path store (store-path-hash-part hello))
            (find-roots store)
            (substitute-urls store)))

(exchange (lambda (store)               ;not-valid
            (let ((none (string-append (%store-prefix) "/" (make-string 32 #\a) "-none")))
              (refused (query-path-info store none))
              (refused (query-path-hash store none))
              (references store hello))))

;; The builder must be in the store; this connection is not recorded.
(define bin "/tmp/golden-bin")
(mkdir-p bin)
(copy-file "/bin/busybox" (string-append bin "/sh"))
(define shell
  (let* ((store (open-connection "/var/guix/daemon-socket/socket"))
         (item (add-to-store store "busybox" #t "sha256" bin)))
    (close-connection store)
    item))

(define (build name script)
  (exchange
   (lambda (store)
     (set-build-options store #:verbosity 0 #:print-build-trace #t
                        #:print-extended-build-trace? #t
                        #:multiplexed-build-output? #t #:use-substitutes? #f)
     (let ((drv (derivation store name (string-append shell "/sh") (list "-c" script)
                            #:sources (list shell))))
       (refused (build-derivations store (list drv)))))))

(build "works" "echo building; echo done > $out")
(build "fails" "echo about to fail; exit 3")

(exchange (lambda (store)               ;collect
            (live-paths store)
            (dead-paths store)))
