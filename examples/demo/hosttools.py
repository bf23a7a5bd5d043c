"""The host's shell with its libraries, as a tree that runs from wherever it lies."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

PROGRAMS = ("sh", "cat", "chmod", "cp", "id", "mkdir", "readlink", "sed")
_LIBRARY = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x", re.MULTILINE)


def collect(directory: Path) -> None:
    """Fill DIRECTORY with `bin/PROGRAM`, `bin/ld.so` and the libraries in `lib`.

    :raises RuntimeError: a program or the host's dynamic loader was not found.
    """
    (directory / "bin").mkdir(parents=True)
    (directory / "lib").mkdir()
    loader: str | None = None
    for name in PROGRAMS:
        program = shutil.which(name)
        if program is None:
            raise RuntimeError(f"no program '{name}' in PATH")
        shutil.copy(program, directory / "bin" / name)
        for library in _libraries(program):
            target = directory / "lib" / Path(library).name
            if not target.exists():
                shutil.copy(library, target)
            if target.name.startswith("ld-"):
                loader = library
    if loader is None:
        raise RuntimeError("the host's shell has no dynamic loader 'ld-*'")
    shutil.copy(loader, directory / "bin" / "ld.so")


def _libraries(program: str) -> list[str]:
    result = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return _LIBRARY.findall(result.stdout)
