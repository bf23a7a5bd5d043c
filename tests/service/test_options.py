"""The command line and the environment."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.errors import BadSetting
from guixd.service.commandline import UsageError, Value, describe
from guixd.service.options import (
    DEFAULT_BUILD_GID,
    OPTIONS,
    Information,
    Options,
    help_text,
    not_effective,
    parse_settings,
    settings_or_exit,
    version_text,
)
from guixd.settings import DEFAULT_SUBSTITUTE_URLS, Directories, Settings, UidRange
from tests.service.program import CHECKOUT


def parsed(*arguments: str, environ: Mapping[str, str] | None = None) -> Settings:
    return parse_settings(arguments, environ or {})


class CommandLineTests(SynchronousTestCase):
    def exits(self, *arguments: str) -> tuple[int, str, str]:
        """Return status, output and errors of a program with ARGUMENTS."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            stop = self.assertRaises(SystemExit, settings_or_exit, arguments, {})
        return stop.code, out.getvalue(), err.getvalue()

    def test_texts(self) -> None:
        """O1: help, usage and version end with status 0."""
        for word in ("--version", "-V", "--vers"):
            self.assertEqual(self.exits(word), (0, version_text() + "\n", ""))
        for word in ("--help", "-?"):
            self.assertEqual(self.exits(word), (0, help_text() + "\n", ""))
        status, out, _ = self.exits("--usage")
        self.assertEqual(status, 0)
        self.assertIn("[--listen=ENDPOINT]", out)

    def test_usage_errors(self) -> None:
        """O1: unknown options, stray arguments and missing values end with status 64."""
        for wrong in (
            ["--nosuch"],
            ["-x"],
            ["stray"],
            ["--", "stray"],
            ["--listen"],
            ["-c"],
            ["--debug=yes"],
            ["--=1"],
            ["--discover", "yes"],
        ):
            status, out, err = self.exits(*wrong)
            self.assertEqual((status, out), (64, ""), wrong)
            self.assertIn("--help", err)

    def test_bad_values(self) -> None:
        """O1: a bad boolean, integer or compression ends with status 1."""
        for wrong, text in (
            ("--discover=maybe", "invalid Boolean value"),
            ("--discover=", "invalid Boolean value"),
            ("--gc-keep-outputs=", "invalid Boolean value"),
            ("--gc-keep-derivations=", "invalid Boolean value"),
            ("--cores=many", "should have an integer value"),
            ("--cores=1_0", "should have an integer value"),
            ("--cores=1 ", "should have an integer value"),
            ("--max-jobs=4294967296", "should have an integer value"),
            ("--timeout=", "should have an integer value"),
            ("--timeout=9223372036854775808", "should have an integer value"),
            ("--timeout=-1", "must not be negative"),
            ("--max-silent-time=-1", "must not be negative"),
            ("--idle-timeout=-1", "must not be negative"),
            ("--rounds=1_0", "invalid number of rounds"),
            ("--rounds=x", "invalid number of rounds"),
            ("--log-compression=zip", "unknown log compression"),
            ("--chroot-directory=relative", "not an absolute path"),
        ):
            status, out, err = self.exits(wrong)
            self.assertEqual((status, out), (1, ""), wrong)
            self.assertTrue(err.startswith("error: "), err)
            self.assertIn(text, err)

    def test_abbreviations(self) -> None:
        """O2: a unique beginning is enough, an ambiguous one is refused."""
        self.assertEqual(parsed("--lis=/a").listen, ("/a",))
        error = self.assertRaises(UsageError, parsed, "--max=1")
        self.assertIn("ambiguous", str(error))
        self.assertEqual(parsed("--max-s", "7").max_silent_time, 7)

    def test_exact_name_wins(self) -> None:
        """O2: a whole name is not ambiguous although others begin with it."""
        self.assertFalse(parsed("--disable-chroot").use_chroot)
        self.assertEqual(parsed("--timeout=5").timeout, 5)

    def test_hidden_options(self) -> None:
        """O3: old names work and the help does not show them."""
        self.assertFalse(parsed("--no-build-hook").offload)
        self.assertFalse(parsed("--disable-store-optimization").deduplicate)
        self.assertEqual(parsed("--disable-log-compression").log_compression, "none")
        for option in OPTIONS:
            shown = f"--{option.name}" in help_text().replace("[", " ").replace("=", " ").split()
            self.assertEqual(shown, bool(option.help), option.name)

    def test_defaults(self) -> None:
        self.assertEqual(parsed(), Settings())
        self.assertEqual(parsed().timeout, 86400)
        self.assertEqual(parsed().max_silent_time, 3600)
        self.assertEqual(parsed().substitute_urls, DEFAULT_SUBSTITUTE_URLS)

    def test_all_options(self) -> None:
        chosen = parsed(
            "--system=i686-linux",
            "-c4",
            "-M",
            "3",
            "--timeout=1",
            "--max-silent-time",
            "2",
            "--rounds=3",
            "--disable-chroot",
            "--chroot-directory=/a",
            "--chroot-directory=/b=/c",
            "--build-users-group=g",
            "--no-substitutes",
            "--no-offload",
            "--discover",
            "--cache-failures",
            "--lose-logs",
            "--log-compression=bzip2",
            "--disable-deduplication",
            "--impersonate-linux-2.6",
            "--isolate-host-loopback",
            "--refuse-private-hosts",
            "--gc-keep-outputs=YES",
            "--gc-keep-derivations=No",
            "--listen=/a",
            "--listen",
            "localhost:1",
            "--debug",
            "--substitute-urls=https://a https://b",
        )
        self.assertEqual(
            chosen,
            Settings(
                listen=("/a", "localhost:1"),
                build_users_group="g",
                use_chroot=False,
                chroot_directories=(("/a", "/a"), ("/b", "/c")),
                cores=4,
                max_jobs=3,
                timeout=1,
                max_silent_time=2,
                rounds=3,
                use_substitutes=False,
                substitute_urls=("https://a", "https://b"),
                offload=False,
                discover=True,
                cache_failures=True,
                keep_log=False,
                log_compression="bzip2",
                deduplicate=False,
                gc_keep_outputs=True,
                gc_keep_derivations=False,
                impersonate_linux_26=True,
                isolate_host_loopback=True,
                refuse_private_hosts=True,
                system="i686-linux",
                debug=True,
            ),
        )

    def test_later_options_win(self) -> None:
        self.assertEqual(parsed("-c1", "--cores=42").cores, 42)
        self.assertFalse(parsed("--discover", "--discover=no").discover)

    def test_numbers(self) -> None:
        """O15, O22: as the stock daemon reads them; -1 stands for the largest."""
        self.assertEqual(parsed("--cores= 5", "--max-jobs=+6").max_jobs, 6)
        self.assertEqual(parsed("-c-1", "-M", "-1").max_jobs, 2**32 - 1)
        self.assertEqual(parsed("--timeout=4294967296").timeout, 2**32)

    def test_help_before_all(self) -> None:
        """O1: who asks for help gets it, whatever else is wrong."""
        for wrong in (["--cores=x", "--help"], ["--help", "--nosuch"]):
            self.assertEqual(self.exits(*wrong), (0, help_text() + "\n", ""))

    def test_no_rounds(self) -> None:
        """O24: 0 rounds are 1."""
        self.assertEqual(parsed("--rounds=0").rounds, 1)

    def test_build_uids(self) -> None:
        self.assertEqual(
            parsed("--build-uids=900-909").build_uids, UidRange(900, 10, DEFAULT_BUILD_GID)
        )
        self.assertEqual(parsed("--build-uids=7-7:8").build_uids, UidRange(7, 1, 8))
        for wrong in ("", "7", "0-3", "9-8", "1-2:0", "1-99999", "1-2:x", "a-b", "1-4294967295"):
            self.assertRaises(BadSetting, parsed, f"--build-uids={wrong}")
        self.assertRaises(BadSetting, parsed, "--build-uids=7-7", "--build-users-group=g")

    def test_not_effective(self) -> None:
        """What is asked for and not done is named."""
        self.assertEqual(not_effective(parsed("--no-offload")), ())
        self.assertEqual(not_effective(parsed()), ("offloading",))

    @settings(deadline=None, max_examples=100)
    @given(st.lists(st.text(alphabet="-=abcdeilmnrstx019/: ", max_size=12), max_size=4))
    def test_anything(self, words: list[str]) -> None:
        """Any command line gives settings or one of the three answers."""
        try:
            self.assertIsInstance(parse_settings(words, {}), Settings)
        except (Information, UsageError, BadSetting):
            pass


class DocumentTests(SynchronousTestCase):
    """O1: doc/options.rst, `--help` and what is parsed agree."""

    def setUp(self) -> None:
        text = (CHECKOUT / "doc/options.rst").read_text()
        rows = re.findall(r"^(``-.*``,?)(?:  +(.*?)(?:  .*)?)?$", text, re.MULTILINE)
        self.defaults = {
            name: default for names, default in rows for name in re.findall("``(--[^`]*)``", names)
        }

    def test_names(self) -> None:
        """Every option is in both, with the same value; old names are told of."""
        shown = [describe(option) for option in OPTIONS if option.help]
        self.assertEqual(sorted(self.defaults), sorted(shown))
        text = (CHECKOUT / "doc/options.rst").read_text()
        for option in OPTIONS:
            self.assertIn(f"``--{option.name}", text)

    def test_defaults(self) -> None:
        """To ask for a documented default changes nothing, and a flag changes something."""
        tried = set()
        for option in OPTIONS:
            default = self.defaults.get(describe(option), "").split(" ")[0].strip("`")
            if option.value is Value.NONE:
                if option.name not in ("help", "usage", "version"):
                    self.assertNotEqual(parsed(f"--{option.name}"), Settings(), option.name)
            elif re.fullmatch("[0-9]+|yes|no|gzip", default):
                self.assertEqual(parsed(f"--{option.name}={default}"), Settings(), option.name)
                tried.add(option.name)
        self.assertGreaterEqual(len(tried), 11, tried)


class EnvironmentTests(SynchronousTestCase):
    def test_directories(self) -> None:
        environ = {
            "NIX_STORE_DIR": "/s//t/../store/",
            "NIX_STORE": "/other",
            "GUIX_STATE_DIRECTORY": "/state",
            "GUIX_LOG_DIRECTORY": "/log",
            "GUIX_CONFIGURATION_DIRECTORY": "/etc",
            "TMPDIR": "/proc/self/root/tmp",
        }
        found = parsed(environ=environ).directories
        self.assertEqual(
            found, Directories("/s/store", "/state", "/log", "/state/db", "/etc", "/tmp")
        )
        self.assertEqual(found.socket, "/state/daemon-socket/socket")

    def test_second_store_variable(self) -> None:
        self.assertEqual(parsed(environ={"NIX_STORE": "/x"}).directories.store, "/x")

    def test_relative(self) -> None:
        """O10: a relative directory is refused."""
        error = self.assertRaises(BadSetting, parsed, environ={"NIX_STORE_DIR": "gnu/store"})
        self.assertIn("not an absolute path", error.text)

    def test_symlink_store(self) -> None:
        self.assertTrue(parsed(environ={"NIX_IGNORE_SYMLINK_STORE": "1"}).ignore_symlink_store)
        self.assertFalse(parsed(environ={"NIX_IGNORE_SYMLINK_STORE": "yes"}).ignore_symlink_store)


class TwistdTests(SynchronousTestCase):
    def test_options(self) -> None:
        """The class for twistd takes the same command line."""
        with patch.dict(os.environ, {"NIX_STORE_DIR": "/x"}):
            options = Options()
            options.parseOptions(["--cores=3", "--listen", "/a"])
        self.assertEqual(options.settings.cores, 3)
        self.assertEqual(options.settings.directories.store, "/x")

    def test_programs(self) -> None:
        """O1: both programs answer --version and refuse unknown options with 64."""
        twistd = "from twisted.scripts.twistd import run; run()"
        for program in (["-m", "guixd"], ["-c", twistd, "guixd"]):
            command = [sys.executable, *program]
            done = subprocess.run([*command, "--version"], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (0, version_text() + "\n"), program)
            self.assertEqual(subprocess.run([*command, "-x"], capture_output=True).returncode, 64)

    def test_broken_pipe(self) -> None:
        """O1: a pager that ends early is no error."""
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-m", "guixd", "--help"], stdout=writing, stderr=subprocess.PIPE
        )
        os.close(writing)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
