"""Benchmarks and compiler gates: cases by name, correctness before any number, rows appended to a CSV."""
