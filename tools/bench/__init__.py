"""Benchmarks: programs with a table as output, never part of the tests."""
