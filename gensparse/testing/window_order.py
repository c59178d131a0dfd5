"""Scale-DiT's window-first token order (Zhang and Tai, 2510.16325): windows in raster order, a walk inside each."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gensparse.testing.natten_order import token_order


def window_first(shape: Sequence[int], window: Sequence[int]) -> NDArray[np.int64]:
    """Raster index of the token at every place of the order; raster order inside windows, ragged ones at the end."""
    order = token_order(shape, window, (1, 1)).reshape(-1)
    return order[order >= 0].astype(np.int64)


def window_hilbert(shape: Sequence[int], window: Sequence[int]) -> NDArray[np.int64]:
    """The same with a Hilbert curve inside windows, whose sides must be one power of two and divide the grid."""
    side = window[0]
    if window[1] != side or side & (side - 1) or any(length % side for length in shape):
        raise ValueError(f"window {tuple(window)} on a grid {tuple(shape)}: pass equal powers of two that divide it")
    rows, columns = hilbert_points(side)
    tops, lefts = (np.arange(0, length, side) for length in shape)
    row = tops[:, None, None] + rows
    column = lefts[None, :, None] + columns
    return (row * shape[1] + column).reshape(-1)


def hilbert_points(side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of every point of a Hilbert curve over side x side tokens, side a power of two.

    Four copies of half the size: the first and the last transposed, so that ends meet.
    """
    if side == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    row, column = hilbert_points(side // 2)
    half, last = side // 2, side // 2 - 1
    quarters = [(column, row), (row, column + half), (row + half, column + half), (2 * half - 1 - column, last - row)]
    rows, columns = zip(*quarters, strict=True)
    return np.concatenate(rows), np.concatenate(columns)
