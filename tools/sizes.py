"""Keep modules small: none above 600 lines, the sandbox at most 700 in all."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
MODULE, SANDBOX, MEDIAN = 600, 700, 150


def main() -> int:
    """Print the sizes of `guixd`'s modules; return 1 if any is too large."""
    sizes = {
        path.relative_to(ROOT): len(path.read_bytes().splitlines())
        for path in (ROOT / "guixd").rglob("*.py")
    }
    modules = [size for path, size in sizes.items() if path.name != "__init__.py"]
    sandbox = sum(size for path, size in sizes.items() if path.parts[1] == "sandbox")
    print(
        f"{len(modules)} modules, {sum(modules)} lines, median {median(modules):.0f},"
        f" largest {max(modules)}; sandbox {sandbox}"
    )
    faults = [
        f"{path}: {size} lines (at most {MODULE})" for path, size in sizes.items() if size > MODULE
    ]
    if sandbox > SANDBOX:
        faults.append(f"guixd/sandbox: {sandbox} lines (at most {SANDBOX})")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
