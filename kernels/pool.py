"""Pooled keys and values: cells of a grid reduced to one token each."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pool_keys(x: Tensor, grid: tuple[int, int, int], cells: tuple[int, int, int], weights: Tensor | None) -> Tensor:
    """Reduce the tokens of every cell to one.

    Args:
        x: [B, F*H*W, heads, D] tokens of `grid` (F, H, W) in raster order.
        cells: tokens per cell and axis.
        weights: a weight per position in the cell, any shape with prod(cells) entries in raster order (CLEAR: shared by
            heads, channels, keys and values, not normalised); the cells must then divide the grid. None for the mean,
            where ragged cells at the end of an axis average the tokens they have.

    Returns:
        [B, number of cells, heads, D] in the dtype of x, cells in raster order.

    Raises:
        ValueError: weights of another size, or with a grid the cells do not divide.

    Source: CLEAR, Liu et al. 2412.16112 (learned weights).
    """
    size = cells[0] * cells[1] * cells[2]
    ragged = [-length % cell for length, cell in zip(grid, cells, strict=True)]
    wide = torch.promote_types(x.dtype, torch.float32)
    if weights is None:
        count = _cells(x.new_ones(1, x.shape[1], 1, 1), grid, cells, ragged).sum(dim=3, dtype=wide)
        return (_cells(x, grid, cells, ragged).sum(dim=3, dtype=wide) / count).to(x.dtype)
    if weights.numel() != size or any(ragged):
        raise ValueError(
            f"pool_keys got {weights.numel()} weights for cells {cells} on grid {grid}; pass {size} weights and cells "
            "that divide the grid."
        )
    weighted = _cells(x, grid, cells, ragged).to(wide) * weights.reshape(size, 1).to(wide)
    return weighted.sum(dim=3).to(x.dtype)


def _cells(x: Tensor, grid: tuple[int, ...], cells: tuple[int, ...], ragged: list[int]) -> Tensor:
    """[B, tokens, heads, D] as [B, number of cells, heads, prod(cells), D]."""
    batch, _, heads, dim = x.shape
    x = x.reshape(batch, *grid, heads, dim)
    if any(ragged):
        x = pad(x, (0, 0, 0, 0, 0, ragged[2], 0, ragged[1], 0, ragged[0]))
    counts = [(length + extra) // cell for length, extra, cell in zip(grid, ragged, cells, strict=True)]
    split = [size for pair in zip(counts, cells, strict=True) for size in pair]
    x = x.reshape(batch, *split, heads, dim).permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
    return x.reshape(batch, counts[0] * counts[1] * counts[2], heads, -1, dim)
