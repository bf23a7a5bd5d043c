"""Tests of the network side."""
