"""Numbers of bytes as text."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from guixd.formats.sizes import size_text


class SizeTests(SynchronousTestCase):
    def test_sizes(self) -> None:
        """S20, G17: the stock daemon's notation, also of what was lost."""
        for size, text in (
            (0, "   0  bytes"),
            (1024, "1024  bytes"),
            (-4096, "-4096  bytes"),
            (1025, "   1.00 KiB"),
            (59000, "  57.62 KiB"),
            (1 << 20, "1024.00 KiB"),
            ((1 << 20) + 1, "   1.00 MiB"),
            (5 << 40, "   5.00 TiB"),
            (1 << 62, "   4.00 EiB"),
            (1 << 72, "4096.00 EiB"),
        ):
            self.assertEqual(size_text(size), text)
