;; Builds with a fixed output, which have a network of their own, and others, which have none.
(load "prelude.scm")

(define port+file (getenv "PAGE"))
(define wanted (base16-string->bytevector (getenv "WANTED")))

(define (page name url)
  (shell name "busybox wget -q -O $out $url" #:env `(("url" . ,url))
         #:hash-algo 'sha256 #:hash wanted))

(define (try label drv)
  (let-values (((text log) (show-attempt label (list (derivation-file-name drv)))))
    (show (string-append label " log")
          (filter (cut string-prefix? "net: " <>) (string-split log #\newline)))))

(define fetched (page "fetched" (string-append "http://10.0.2.2:" port+file)))
(try "fetched" fetched)
(try "local" (page "local" (string-append "http://127.0.0.1:" port+file)))
(try "not fixed"
     (shell "not-fixed" "busybox wget -q -O $out $url"
            #:env `(("url" . ,(string-append "http://10.0.2.2:" port+file)))))
(try "facts"
     (shell "facts"
            "{ ip -o addr | sed '/fe80::80[/]/!s/.*inet6 fe80::.*//; s/ *\\\\.*//';
               ip route; cat /etc/resolv.conf; echo; cd /proc/sys/net;
               cat ipv4/conf/all/route_localnet ipv6/conf/tap0/accept_dad ipv6/conf/tap0/accept_ra;
               ls /proc/1/fd; stat -c '%a %n' /etc/resolv.conf; } 2>&1 | sed 's/^/net: /'; exit 1"
            #:hash-algo 'sha256 #:hash wanted))
