;; guixd as root, a service of the GNU Shepherd (0.10 or later).  Either its configuration has
;;   (load "/usr/local/etc/guixd.scm")
;; or, until the next start:  herd load root /usr/local/etc/guixd.scm
;; It listens where the service `guix-daemon' does, which must not run at the same time.

(define guixd
  (service
   '(guixd)
   #:documentation "Build daemon for GNU Guix."
   ;; Shepherd opens the socket, so that clients can connect from the beginning, and
   ;; while the daemon is started again.
   #:start (make-systemd-constructor
            '("/usr/bin/env" "guixd" "--build-users-group=guixbuild" "--discover=no")
            (list (endpoint (make-socket-address AF_UNIX "/var/guix/daemon-socket/socket")
                            #:name "guixd"
                            #:socket-directory-permissions #o755))
            #:lazy-start? #f
            #:log-file "/var/log/guixd.log"
            #:environment-variables
            (cons* "GUIX_STATE_DIRECTORY=/var/guix" "LC_ALL=C.UTF-8"
                   (default-environment-variables)))
   ;; It is killed after five seconds: a --stop-timeout of more is of no use.
   #:stop (make-systemd-destructor)
   #:respawn? #t))

(register-services (list guixd))
(start-in-the-background '(guixd))
