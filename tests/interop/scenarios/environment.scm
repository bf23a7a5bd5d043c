;; What a builder finds around it, as far as two daemons on one machine must agree.
;; (guixd has /tmp and the store as mounts of the disk in a root in memory.)
(load "prelude.scm")

(define probe
  (shell "probe" "
{ echo '* environment'; env | sort
  echo '* who'; id; cat /etc/passwd /etc/group /etc/hosts
  echo '* where'; readlink /proc/self/cwd; ls -la / /build 2>/dev/null | awk '{print $1,$3,$4,$9,$10,$11}'
  echo '* devices'; ls -la /dev | sed 1d | awk '{print $1,$3,$4,$NF}'
  echo '* etc'; ls -la /etc | sed 1d | awk '{print $1,$3,$4,$9}'
  echo '* store'; ls -la /gnu/store | sed 1d | awk '{print $1,$3,$4,$9}'
  echo '* host'; hostname; cat /proc/sys/kernel/domainname
  echo '* network'; ip -o addr | awk '{print $2,$3,$4}'
  echo '* processes'; ls /proc | grep '^[0-9]' | head -1; readlink /proc/1/exe
  echo '* descriptors'; for fd in /proc/$$/fd/*; do echo ${fd##*/}; done
  echo '* limits'; ulimit -c; ulimit -s; umask
  echo '* capabilities'; grep -E 'Cap[IPEA]|NoNewPrivs|Seccomp:|Sig(Ign|Blk)' /proc/self/status
  echo '* mounts'; cut -d ' ' -f 5- /proc/self/mountinfo | sed 's/ - / /' | awk '{print $1}' | grep -vx -e /tmp -e /gnu/store | sort
  echo '* personality'; cat /proc/self/personality 2>&1
  echo '* arguments'; echo \"$0 $#\"; cat /proc/$$/cmdline | head -c 80 | cut -d - -f 1
  echo '* writable'; for d in / /gnu/store /tmp /dev /dev/shm /etc /proc/sys; do
     ( : > $d/.probe ) 2>/dev/null && echo $d; done
  mkdir /tmp/x && stat -c '%a %u %g' . /tmp /tmp/x $NIX_BUILD_TOP
  echo end
} > $out 2>&1"
         #:env '(("text" . "with \"quotes\" and\nlines") ("impureEnvVars" . "LC_ALL HOME"))))
(show-attempt "probe" (list (derivation-file-name probe)))
(for-each (lambda (section)
            (match (string-split section #\newline)
              ((label . lines)
               (show (string-append "in " label)
                     (map (lambda (line) line) lines)))))
          (let ((text (contents (out probe))))
            (let loop ((text text) (sections '()))
              (match (string-contains text "\n* ")
                (#f (reverse (cons text sections)))
                (n (loop (substring text (+ n 3)) (cons (substring text 0 n) sections)))))))
