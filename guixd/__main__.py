"""`python -m guixd OPTION...`: the daemon in the foreground, without a twistd."""

from __future__ import annotations

import os
import sys

from guixd.net.spawning import StartedFetcher
from guixd.service.options import settings_or_exit


def main() -> None:
    """Run the daemon that the command line asks for, until SIGTERM or SIGINT."""
    settings = settings_or_exit(sys.argv[1:], os.environ)
    # Both take as long to load, and the first client may want substitutes.
    fetcher = StartedFetcher(os.environ) if settings.use_substitutes else None
    # Not before: the reactor takes longer to import than --help to print.
    from guixd.service.tap import run

    raise SystemExit(run(settings, fetcher))


if __name__ == "__main__":
    main()
