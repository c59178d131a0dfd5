"""NATTEN's token permutation: tokens sorted by dilation group, then tile, then place in the tile."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def token_order(grid: Sequence[int], tile: Sequence[int], dilation: Sequence[int]) -> NDArray[np.int32]:
    """Raster index of the token in every slot, -1 for padding: [dilation groups, slots per group].

    Axes are padded to a multiple of tile * dilation; groups, tiles and places are in row-major order (NATTEN,
    token_permute).
    """
    steps = [t * d for t, d in zip(tile, dilation, strict=True)]
    padded = [-(-length // step) * step for length, step in zip(grid, steps, strict=True)]
    index = np.full(padded, -1, np.int32)
    index[tuple(slice(length) for length in grid)] = np.arange(np.prod(grid), dtype=np.int32).reshape(grid)
    split = [part for size, t, d in zip(padded, tile, dilation, strict=True) for part in (size // (t * d), t, d)]
    axes = len(grid)
    tiles, places, groups = ([3 * axis + part for axis in range(axes)] for part in range(3))
    ordered = index.reshape(split).transpose(*groups, *tiles, *places)
    return ordered.reshape(int(np.prod(dilation)), -1)
