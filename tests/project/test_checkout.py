"""The checkout itself: commands that are documented, names that must not appear, the wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.support import temporary_directory

ROOT = Path(__file__).parents[2]
# Put together so that this file does not contain them.
_FOREIGN = re.compile(rb"(?<![\w.~/-])/(?:wor" rb"k|root|srv)/|pypi\.org|files\.pythonhos" rb"ted")


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    if not listed:  # a copy without its history
        return [
            path
            for path in ROOT.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        ]
    return [ROOT / name for name in listed.split("\0") if name]


class Commands(SynchronousTestCase):
    """What README.rst tells readers to type exists."""

    def test_make_targets(self) -> None:
        """Each `make X` of README.rst is a target, the demo and the tests come first."""
        readme = (ROOT / "README.rst").read_text()
        targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        named = re.findall(r"(?:``|^    )make (\w+)", readme, re.MULTILINE)
        self.assertEqual(named[:2], ["demo", "test"])
        self.assertEqual(set(named) - targets, set())

    def test_files_named(self) -> None:
        """Each file that README.rst names in double backquotes with a slash exists."""
        readme = (ROOT / "README.rst").read_text()
        for name in re.findall(
            r"``((?:etc|doc|examples|bench|tests|tools|guixd)/[\w./-]*)``", readme
        ):
            self.assertTrue((ROOT / name).exists(), name)

    def test_example(self) -> None:
        """The program in README.rst is `examples/embed.py`, and that runs."""
        readme = (ROOT / "README.rst").read_text()
        example = ROOT / "examples" / "embed.py"
        body = example.read_text().partition("import sys\n\n")[2].partition("\n\nif __name__")[0]
        self.assertIn(textwrap.indent(body.strip(), "    "), readme)
        result = subprocess.run(
            [sys.executable, str(example), temporary_directory(self)],
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertRegex(result.stdout, r"^/.*-hello\.txt 128\n$", result.stderr)


class Cleaning(SynchronousTestCase):
    def test_clean(self) -> None:
        """`make clean` removes all that git is told to ignore, and nothing else."""
        place = Path(temporary_directory(self))
        shutil.copy(ROOT / "Makefile", place)
        for name in (ROOT / ".gitignore").read_text().split():
            inside = name.strip("/").replace("*", "x")
            for above in ("", "guixd/net/") if inside == "__pycache__" else ("",):
                (place / above / inside).mkdir(parents=True)
                (place / above / inside / "file").touch()
        subprocess.run(["make", "clean"], cwd=place, check=True, capture_output=True)
        self.assertEqual([p.name for p in place.rglob("*") if p.is_file()], ["Makefile"])


class Contents(SynchronousTestCase):
    """Files are about guixd, not about one machine."""

    def test_no_places_of_one_machine(self) -> None:
        """No file names a developer's directory or the host of a package registry."""
        found = []
        for path in _files():
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue  # deleted, but not yet in git
            match = _FOREIGN.search(data)
            if match:
                found.append(f"{path.relative_to(ROOT)}: {match[0]!r}")
        self.assertEqual(found, [])

    def test_maps_of_packages(self) -> None:
        """The docstring of each large package names all of its modules, and nothing else."""
        for package in ("build", "formats", "net", "service", "store"):
            directory = ROOT / "guixd" / package
            modules = {path.stem for path in directory.glob("*.py")} - {"__init__"}
            text = (directory / "__init__.py").read_text()
            self.assertEqual(set(re.findall(r"`(\w+)`", text)), modules, package)

    def test_modules_are_small(self) -> None:
        """No module above 600 lines, the sandbox at most 700 in all."""
        command = [sys.executable, str(ROOT / "tools" / "sizes.py")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertEqual(result.returncode, 0, result.stderr)


class Packaging(SynchronousTestCase):
    """What is installed is complete."""

    def test_wheel_has_the_plugin(self) -> None:
        """A wheel contains the package, its types marker and the twistd plugin."""
        import hatchling.builders.wheel

        directory = temporary_directory(self)
        builder = hatchling.builders.wheel.WheelBuilder(str(ROOT))
        wheel = next(builder.build(directory=directory, versions=["standard"]))
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        expected = {
            f"guixd/{path.relative_to(ROOT / 'guixd')}" for path in (ROOT / "guixd").rglob("*.py")
        }
        self.assertEqual(expected - names, set())
        self.assertIn("twisted/plugins/guixd_plugin.py", names)
        self.assertIn("guixd/py.typed", names)
        self.assertNotIn("twisted/__init__.py", names)
        self.assertNotIn("twisted/plugins/__init__.py", names)

    def test_plugin_is_found(self) -> None:
        """The installed `twistd` knows the command `guixd`."""
        script = (
            "from twisted.application.service import IServiceMaker\n"
            "from twisted.plugin import getPlugins\n"
            "print([m.tapname for m in getPlugins(IServiceMaker) if m.tapname == 'guixd'])\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=False
        )
        self.assertEqual(result.stdout.strip(), "['guixd']", result.stderr)
