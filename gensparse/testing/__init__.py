"""Helpers for tests and for `--tiny` samples: tiny pipelines with random weights, made without any download."""
