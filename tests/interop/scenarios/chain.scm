;; Builds the first LENGTH links of a chain; each refers to the one before it.
(load "prelude.scm")

(define length (string->number (getenv "LENGTH")))
(define chain
  (fold (lambda (n links)
          (cons (match links
                  (() (shell "link-0" "echo 0 > $out"))
                  ((last . _)
                   (shell (format #f "link-~a" n) "cat $last > $out; echo $last >> $out"
                          #:inputs (list last) #:env `(("last" . ,(out last))))))
                links))
        '() (iota length)))

(let-values (((result text log) (attempt (list (derivation-file-name (first chain))))))
  (show "result" result)
  (show "built" (filter-map (match-lambda
                              (("build-succeeded" drv . _) (store-path-package-name drv))
                              (_ #f))
                            (traces log))))
(show "items" (map out chain))
(show "infos" (map (compose info out) chain))
(show "referrers" (map (compose (cut referrers store <>) out) chain))
