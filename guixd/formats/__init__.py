"""Pure values and bytes: no input or output, no clock, no Twisted."""
