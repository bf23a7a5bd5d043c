"""Keep modules small: none above 600 lines, packages that are to be read with care small in all.

These are what runs with privileges: the sandbox, and the network of builds.  Blank lines,
comments and docstrings help readers, so they are not counted there.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
MODULE = 600
PRIVILEGED = {"sandbox": 700, "uplink": 200}
"""Most lines of code of these packages."""
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def code_lines(text: str) -> int:
    """Return how many lines of the module TEXT hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE and token.string:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
                lines.difference_update(range(first, last + 1))
    return len(lines)


def main() -> int:
    """Print the sizes of `guixd`'s modules; return 1 if any is too large."""
    sizes = {
        path.relative_to(ROOT): len(path.read_bytes().splitlines())
        for directory in ("guixd", "tests", "bench")
        for path in (ROOT / directory).rglob("*.py")
    }
    modules = [
        size
        for path, size in sizes.items()
        if path.parts[0] == "guixd" and path.name != "__init__.py"
    ]
    privileged = {
        package: sum(
            code_lines(path.read_text()) for path in (ROOT / "guixd" / package).glob("*.py")
        )
        for package in PRIVILEGED
    }
    print(
        f"{len(modules)} modules, {sum(modules)} lines, median {median(modules):.0f},"
        f" largest {max(modules)}; of code: "
        + ", ".join(f"{package} {size}" for package, size in privileged.items())
    )
    faults = [
        f"{path}: {size} lines (at most {MODULE})" for path, size in sizes.items() if size > MODULE
    ]
    for package, most in PRIVILEGED.items():
        if privileged[package] > most:
            faults.append(f"guixd/{package}: {privileged[package]} lines of code (at most {most})")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
