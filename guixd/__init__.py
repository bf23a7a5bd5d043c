"""guixd, the build daemon of GNU Guix as one event-driven process.

The layers, lowest first: `formats` (values and bytes), `signatures` (keys), `store` (files and
SQLite) and `sandbox` with `uplink` (the privileged corner), `net` (servers), `build` (what to
build, when and how) and `service` (the daemon).  Each begins with a map of its modules.
See doc/design.rst.
"""

__version__ = "0.1.0"
