"""Checks shared by the patterns: whole numbers, and settings given once or once per grid axis."""

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np

from gensparse.errors import ConfigError
from gensparse.layout import Grid

AXES = ("F", "H", "W")

PerAxis = int | tuple[int, ...]


def whole_number(what: str, value: Any, *, low: int = 1, high: int | None = None, hint: str = "") -> int:
    """`value` as an int in low..high, or ConfigError naming what was given and what is allowed."""
    try:
        number = index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool | np.bool_) or number < low or (high is not None and number > high):
        allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ConfigError(f"{what}={value!r} is not allowed; pass {allowed}{hint and f' ({hint})'}.")
    return number


def choice(what: str, value: Any, allowed: Sequence[Any]) -> None:
    """ConfigError unless `value` is one of `allowed` (same type, so that 1 is not True)."""
    if not any(type(value) is type(entry) and value == entry for entry in allowed):
        raise ConfigError(f"{what}={value!r} is not allowed; pass one of {', '.join(map(repr, allowed))}.")


def per_axis(what: str, value: Any, *, low: int = 1, hint: str = "in tokens") -> PerAxis:
    """Check an int, or one to three ints for the last axes of the grid, and make it hashable."""
    if isinstance(value, list | tuple):
        if not 1 <= len(value) <= 3:
            raise ConfigError(f"{what}={value!r} has {len(value)} entries; pass one integer or one per axis (F, H, W).")
        return tuple(whole_number(what, entry, low=low, hint=hint) for entry in value)
    return whole_number(what, value, low=low, hint=hint)


def spread(what: str, value: Any, grid: Grid, *, single: Any = 1) -> tuple[Any, Any, Any]:
    """A setting as one entry per axis (F, H, W).

    A plain value counts on every axis longer than one token, which get `single`. A tuple names the last axes; the
    axes it leaves out must have one token.
    """
    if not isinstance(value, tuple):
        frames, rows, columns = (value if length > 1 else single for length in grid)
        return frames, rows, columns
    missing = 3 - len(value)
    if any(length > 1 for length in grid[:missing]):
        raise ConfigError(f"{what}={value!r} leaves out an axis of grid {grid}; pass one entry per axis (F, H, W).")
    return ((single,) * missing + value)[0:3]


def fits(what: str, value: Any, spans: Sequence[int], grid: Grid, remedy: str) -> None:
    """ConfigError when a span is longer than its axis."""
    for name, span, length in zip(AXES, spans, grid, strict=True):
        if span > length:
            raise ConfigError(
                f"{what}={value!r} spans {span} tokens on axis {name} of grid {grid}, which has {length}; {remedy}."
            )
