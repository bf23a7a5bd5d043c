;; A small graph: a dependency, an output beside the main one, a self reference.
(load "prelude.scm")

(define greeting
  (shell "greeting" "echo making a greeting; echo hello > $out"))
(define tree
  (shell "tree"
         "echo two outputs; mkdir -p $out/bin $out/empty $doc
cp() { cat $1 > $2; }; cp $greeting $out/text; echo $out > $out/self
echo '#!/bin/sh' > $out/bin/run; chmod 4755 $out/bin/run; ln -s ../text $out/bin/link
ln $out/text $out/again; echo manual > $doc/manual; chmod 600 $doc/manual; echo done >&2"
         #:inputs (list greeting) #:outputs '("out" "doc")
         #:env `(("greeting" . ,(out greeting)))))
(define last-one
  (shell "last" "cat $tree/text $doc/manual > $out; echo $doc >> $out"
         #:inputs (list (list tree "doc" "out"))
         #:env `(("tree" . ,(out tree)) ("doc" . ,(out tree "doc")))))

(show "derivations" (map derivation-file-name (list greeting tree last-one)))
(let-values (((text log) (show-attempt "build" (list (derivation-file-name last-one)))))
  (show "log"
        (filter (negate (cut string-prefix? "@ build-started" <>))
                (string-split (plain log) #\newline))))
(for-each
 (lambda (name path)
   (show name path)
   (show (string-append name " info") (info path))
   (show (string-append name " derivers") (valid-derivers store path))
   (show (string-append name " referrers") (referrers store path)))
 '("greeting" "tree" "doc" "last")
 (list (out greeting) (out tree) (out tree "doc") (out last-one)))
(show "last contents" (contents (out last-one)))
(show "outputs" (query-derivation-outputs store (derivation-file-name tree)))
(show "modes"
      (map (lambda (file)
             (let ((st (lstat (string-append (out tree) file))))
               (list file (stat:type st) (number->string (stat:perms st) 8) (stat:mtime st)
                     (stat:uid st) (stat:gid st))))
           '("" "/bin" "/bin/run" "/bin/link" "/text" "/again" "/empty")))
(let-values (((text log) (show-attempt "again" (list (derivation-file-name last-one)))))
  (show "log again" log))
(show-attempt "named output" (list (cons (derivation-file-name tree) "doc")))
(show-attempt "unknown output" (list (cons (derivation-file-name tree) "nosuch")))
(show "log file" (log-file store (out greeting)))
