"""Lines for programs."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.formats import trace

DRV = "/gnu/store/mnrq9gdczvffjb35m1rq5nvb59yklrzj-works.drv"
LOG = "/var/log/guix/drvs/mn//rq9gdczvffjb35m1rq5nvb59yklrzj-works.drv.gz"

LINES = (
    (trace.BuildStarted(DRV, "a-linux", LOG, 77), f"build-started {DRV} - a-linux {LOG} 77"),
    (trace.BuildStarted(DRV, "a-linux", "", 77), f"build-started {DRV} - a-linux  77"),
    (trace.BuildSucceeded(DRV), f"build-succeeded {DRV} -"),
    (trace.BuildFailed(DRV, 1, "it did not work"), f"build-failed {DRV} - 1 it did not work"),
    (trace.BuildFailed(DRV, 0, "bad"), f"build-failed {DRV} - 0 bad"),
    (trace.BuildTimedOut(DRV), f"build-failed {DRV} - timeout"),
    (trace.BuildFailedBefore(DRV), f"build-failed {DRV} - cached"),
    (trace.HashMismatch("/x", "r:sha256", "00a", "00b"), "hash-mismatch /x r:sha256 00a 00b"),
    (trace.UnsupportedPlatform(DRV, "armhf-linux"), f"unsupported-platform {DRV} armhf-linux"),
    (trace.HookFailed(DRV, 256, "no host"), f"hook-failed {DRV} - 256 no host"),
    (trace.SubstituterStarted("/x"), "substituter-started /x substitute"),
    (trace.SubstituterSucceeded("/x"), "substituter-succeeded /x"),
    (trace.SubstituterFailed("/x", "not-found at all"), "substituter-failed /x not-found at all"),
    (trace.SubstituterFailed("/x", "timeout"), "substituter-failed /x timeout"),
)  # fmt: skip

BEGINNINGS = ["@ " + text[:size] for _, text in LINES for size in range(len(text))]


class Traces(SynchronousTestCase):
    """Each kind of line."""

    def test_lines(self) -> None:
        """P24: the forms of all lines, both ways."""
        for value, text in LINES:
            self.assertEqual(value.line, "@ " + text)
            self.assertEqual(trace.parse("@ " + text), value)

    def test_one_line(self) -> None:
        """A text with line breaks stays on one line."""
        self.assertEqual(
            trace.BuildFailed(DRV, 1, "first\nsecond\rthird\n").line,
            f"@ build-failed {DRV} - 1 first second third",
        )

    @settings(deadline=None)
    @given(
        st.text(max_size=60)
        | st.sampled_from(["@ " + text[:i] for _, text in LINES for i in range(60)])
    )
    def test_other_lines(self, line: str) -> None:
        """What is not a trace is None, what is one gives the line again."""
        value = trace.parse(line)
        if value is not None:
            self.assertEqual(trace.parse(value.line), value)

    def test_not_traces(self) -> None:
        """Examples of lines that are for people."""
        for line in ("", "@", "@ ", "@ build-started", f"build-succeeded {DRV} -", "@ x y z"):
            self.assertIsNone(trace.parse(line), line)
        for line in (f"@ build-failed {DRV} - soon", f"@ build-started {DRV} - a b -1"):
            self.assertIsNone(trace.parse(line), line)

    @settings(deadline=None)
    @given(st.integers(0, 2**31), st.binary(max_size=50))
    def test_build_log(self, pid: int, chunk: bytes) -> None:
        """P25: the number in the header is that of the bytes that follow."""
        data = trace.build_log(pid, chunk)
        self.assertEqual(data, b"@ build-log %d %d\n" % (pid, len(chunk)) + chunk)
