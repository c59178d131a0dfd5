"""Helpers for tests and `--tiny` samples: the test kit of pattern authors, tiny pipelines with random weights."""

from gensparse.testing.pattern_checks import PatternDefectError, check_pattern, default_layouts

__all__ = ["PatternDefectError", "check_pattern", "default_layouts"]
