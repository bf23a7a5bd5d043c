"""The tests of guixd, a mirror of its folders."""
