"""Grids from position ids: what the ids of a rotary embedding say about the order of tokens.

Ids are read by where they repeat, not by their values: high-resolution runs use fractional steps and offsets, and
half-precision ids merge neighbouring values above 256.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gensparse.errors import LayoutMismatchError

Numbers = NDArray[np.floating]


def raster_grid(rows: Numbers, columns: Numbers) -> tuple[int, int]:
    """(height, width) of tokens in raster order from their row and column ids [N].

    Raises:
        LayoutMismatchError: the ids are not those of a rectangle read row by row.
    """
    width = _row_length(rows, columns)
    height, rest = divmod(len(rows), width)
    if rest == 0 and _is_raster(rows.reshape(height, width), columns.reshape(height, width)):
        return height, width
    raise LayoutMismatchError(
        f"The position ids of {len(rows)} picture tokens are not a rectangle read row by row (a row seems to have "
        f"{width} tokens); pass ids in raster order."
    )


def runs(values: Numbers) -> list[slice]:
    """Slices of consecutive equal values [N]."""
    cuts = np.flatnonzero(np.diff(values)) + 1
    return [slice(int(start), int(stop)) for start, stop in pairwise([0, *cuts, len(values)])]


def _row_length(rows: Numbers, columns: Numbers) -> int:
    """Tokens up to the first return to a smaller column, else up to the first new row, else all."""
    for breaks in (np.diff(columns) < 0, np.diff(rows) != 0):
        if breaks.any():
            return int(breaks.argmax()) + 1
    return len(rows)


def _is_raster(rows: Numbers, columns: Numbers) -> bool:
    same_row = (rows == rows[:, :1]).all()
    same_columns = (columns == columns[:1]).all()
    return bool(same_row and same_columns and (np.diff(rows[:, 0]) >= 0).all() and (np.diff(columns[0]) >= 0).all())
