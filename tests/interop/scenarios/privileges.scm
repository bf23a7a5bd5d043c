;; What a user without rights may and may not do.
(load "prelude.scm")

(define drv (shell "fine" "id -u > $out"))
(show-attempt "build" (list (derivation-file-name drv)))
(show "builder" (contents (out drv)))
(show "add" (add-text-to-store store "mine" "text"))
(show "root" (let ((link (string-append work "/link-of-a-user")))
               (symlink (out drv) link)
               (add-indirect-root store link)))
;; The refusal may come as a message or, as the server closes, as an end of file.
(define repairing (connect #:verbosity 0))
(show "repair"
      (catch #t
        (lambda ()
          (guard (c ((store-protocol-error? c) 'refused))
            (build-things repairing (list (derivation-file-name drv)) (build-mode repair))))
        (lambda _ 'refused)))
(show "still served" (valid-path? store (out drv)))
