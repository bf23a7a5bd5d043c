"""Name the tests that were skipped in every run given: python tools/skipped.py REPORT.xml..."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree


def main(reports: list[str]) -> int:
    """Print each test that ran nowhere with its reason; return 1 if a report is missing."""
    ran: set[str] = set()
    skipped: dict[str, str] = {}
    for report in reports:
        if not Path(report).exists():
            print(f"no report {report}", file=sys.stderr)
            return 1
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}.{case.get('name')}"
            skip = case.find("skipped")
            if skip is None:
                ran.add(name)
            else:
                skipped[name] = skip.get("message", "")
    nowhere = sorted(set(skipped) - ran)
    print(f"== {len(ran)} tests ran, {len(nowhere)} were skipped")
    for name in nowhere:
        print(f"skipped: {name}: {skipped[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
