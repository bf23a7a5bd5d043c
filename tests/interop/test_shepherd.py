"""The service for the GNU Shepherd, read by Guile with procedures as its manual has them."""

from __future__ import annotations

import shlex
import subprocess

from twisted.trial.unittest import SynchronousTestCase

from tests.interop import guest
from tests.interop.guest import requires_guest
from tests.service.program import CHECKOUT

SHEPHERD = """
(define (show label value) (format #t "~a: ~s~%" label value))
(define (default-environment-variables) '("PATH=/bin"))
(define* (endpoint address #:key name style backlog socket-owner socket-group
                   socket-directory-permissions)
  (list (sockaddr:fam address) (sockaddr:path address) socket-directory-permissions))
(define* (make-systemd-constructor command endpoints #:key (lazy-start? #t) user group
                                   supplementary-groups log-file directory file-creation-mask
                                   create-session? resource-limits environment-variables)
  (show 'command command)
  (show 'endpoints endpoints)
  (show 'lazy lazy-start?)
  (show 'environment environment-variables)
  (const 'running))
(define (make-systemd-destructor) (const #f))
(define* (service names #:key documentation requirement respawn? start stop)
  (show 'names names)
  (show 'respawn respawn?)
  (list (start) (stop 'running)))
(define (register-services services) (show 'registered services))
(define (start-in-the-background names) (show 'started names))
(load (cadr (command-line)))
"""


@requires_guest
class ShepherdTests(SynchronousTestCase):
    def test_service(self) -> None:
        """O9: it passes the usual socket to the daemon, which has the options of other inits."""
        unit = (CHECKOUT / "etc/guixd.service").read_text()
        (command,) = (line[10:] for line in unit.splitlines() if line.startswith("ExecStart="))
        words = " ".join(f'"{word}"' for word in shlex.split(command))
        done = subprocess.run(
            guest.view(
                guest.root(),
                {"/mnt/etc": str(CHECKOUT / "etc")},
                ["guile", "--no-auto-compile", "-c", SHEPHERD, "/mnt/etc/guixd.scm"],
            ),
            capture_output=True,
            text=True,
        )
        self.assertEqual(
            done.stdout.splitlines(),
            [
                f"command: ({words})",
                'endpoints: ((1 "/var/guix/daemon-socket/socket" 493))',
                "lazy: #f",
                'environment: ("GUIX_STATE_DIRECTORY=/var/guix" "LC_ALL=C.UTF-8" "PATH=/bin")',
                "names: (guixd)",
                "respawn: #t",
                "registered: ((running #f))",
                "started: (guixd)",
            ],
            done.stderr,
        )
