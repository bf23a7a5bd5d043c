"""guixd, the build daemon of GNU Guix as one event-driven process.

The layers, lowest first: `formats` (values and bytes), `store` (files and
SQLite), `sandbox` (the privileged corner), `build` (what to build, when and
how) and `service` (the daemon).  See doc/design.rst.
"""

__version__ = "0.1.0"
