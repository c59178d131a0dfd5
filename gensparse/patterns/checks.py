"""Checks shared by the patterns: whole numbers, and settings given once or once per grid axis."""

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np

from gensparse.errors import ConfigError
from gensparse.layout import Grid

AXES = ("F", "H", "W")

PerAxis = int | tuple[int, ...]
PerAxisOrWhole = int | None | tuple[int | None, ...]


def whole_number(what: str, value: Any, *, low: int = 1, high: int | None = None, unit: str = "") -> int:
    """`value` as an int in low..high, or ConfigError naming what was given and what is allowed."""
    try:
        number = index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool | np.bool_) or number < low or (high is not None and number > high):
        allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ConfigError(f"{what}={value!r} is not allowed; pass {allowed}{unit and f' ({unit})'}.")
    return number


def choice(what: str, value: Any, allowed: Sequence[Any]) -> None:
    """ConfigError unless `value` is one of `allowed` (same type, so that 1 is not True)."""
    if not any(type(value) is type(entry) and value == entry for entry in allowed):
        raise ConfigError(f"{what}={value!r} is not allowed; pass one of {', '.join(map(repr, allowed))}.")


def flags(what: str, value: Any) -> bool | tuple[bool, ...]:
    """Check a bool, or one to three bools for the last axes of the grid."""
    entries = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not 1 <= len(entries) <= 3 or not all(isinstance(entry, bool | np.bool_) for entry in entries):
        raise ConfigError(f"{what}={value!r} is not allowed; pass True or False, or one of them per axis (F, H, W).")
    settled = tuple(map(bool, entries))
    return settled if isinstance(value, list | tuple) else settled[0]


def per_axis(what: str, value: Any, *, low: int = 1, whole: bool = False, unit: str = "tokens") -> Any:
    """Check an int, or one to three ints for the last axes of the grid; `whole` allows None for a whole axis."""
    if isinstance(value, list | tuple):
        if not 1 <= len(value) <= 3:
            raise ConfigError(f"{what}={value!r} has {len(value)} entries; pass one integer or one per axis (F, H, W).")
        return tuple(per_axis(f"{what}={value!r}: entry", entry, low=low, whole=whole, unit=unit) for entry in value)
    return None if whole and value is None else whole_number(what, value, low=low, unit=unit)


def spread(what: str, value: Any, grid: Grid, *, single: Any = 1) -> tuple[Any, Any, Any]:
    """A setting as one entry per axis (F, H, W).

    A plain value counts on every axis longer than one token; the others get `single`. A tuple names the last axes; the
    axes it leaves out must have one token.
    """
    if isinstance(value, tuple):
        left_out = 3 - len(value)
        if any(length > 1 for length in grid[:left_out]):
            raise ConfigError(f"{what}={value!r} leaves out an axis of grid {grid}; pass one entry per axis (F, H, W).")
        entries = (single,) * left_out + value
    else:
        entries = tuple(value if length > 1 else single for length in grid)
    frames, rows, columns = entries
    return frames, rows, columns


def windows(what: str, value: Any, grid: Grid, dilation: Sequence[int] = (1, 1, 1)) -> Grid:
    """Window per axis with None filled in; ConfigError when window * dilation is longer than its axis."""
    given = spread(what, value, grid)
    filled = [length // d if w is None else w for w, d, length in zip(given, dilation, grid, strict=True)]
    for axis, window, d in zip(AXES, filled, dilation, strict=True):
        fits(what, window, axis, grid, dilation=d)
    frames, rows, columns = filled
    return frames, rows, columns


def not_above(what: str, value: Any, limit_name: str, limit: Any, *, strict: bool = False) -> None:
    """ConfigError when an entry of `value` exceeds (strict: reaches) that of `limit`; None has no limit."""
    ours = value if isinstance(value, tuple) else (value,)
    theirs = limit if isinstance(limit, tuple) else (limit,)
    count = max(len(ours), len(theirs))
    if len(ours) not in (1, count) or len(theirs) not in (1, count):
        raise ConfigError(
            f"{what}={value!r} and {limit_name}={limit!r} differ in length; pass one entry per axis in both."
        )
    pairs = zip(ours * (count // len(ours)), theirs * (count // len(theirs)), strict=True)
    if any(b is not None and (a >= b if strict else a > b) for a, b in pairs):
        word = "less than" if strict else "at most"
        raise ConfigError(f"{what}={value!r} is not allowed; pass {word} {limit_name}={limit!r} on every axis.")


def fits(what: str, window: int, axis: str, grid: Grid, *, dilation: int = 1) -> None:
    """ConfigError when window * dilation is longer than the axis."""
    length = grid[AXES.index(axis)]
    if not 1 <= window <= length // dilation:
        times = f" times dilation {dilation}" if dilation > 1 else ""
        raise ConfigError(
            f"{what}={window}{times} does not fit axis {axis} of grid {grid}, which has {length} tokens; keep it "
            "within them, or call clamped(grid) on the pattern."
        )
