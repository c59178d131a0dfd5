"""Pooled keys and values: cells of a grid, or runs of a sequence, reduced to one token each."""

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

Axes = tuple[int, int, int]
NO_SHIFT: Axes = (0, 0, 0)


def pool_keys(x: Tensor, grid: Axes, cells: Axes, weights: Tensor | None, shift: Axes = NO_SHIFT) -> Tensor:
    """Reduce the tokens of every cell to one.

    Args:
        x: [B, F*H*W, heads, D] tokens of `grid` (F, H, W) in raster order.
        cells: tokens per cell and axis.
        weights: a weight per position in the cell, any shape with prod(cells) entries in raster order (CLEAR: shared by
            heads, channels, keys and values, not normalised); the cells must then divide the grid. None for the mean,
            where ragged cells at both ends of an axis average the tokens they have.
        shift: tokens before the first whole cell on each axis.

    Returns:
        [B, number of cells, heads, D] in the dtype of x, cells in raster order.

    Raises:
        ValueError: weights of another size, or with a grid the cells do not divide.

    Source: CLEAR, Liu et al. 2412.16112 (learned weights).
    """
    lead, tail = _margins(grid, cells, shift)
    wide = torch.promote_types(x.dtype, torch.float32)
    if weights is None:
        count = cell_counts(grid, cells, shift, x.device).to(wide)[:, None, None]
        return (_cells(x, grid, cells, lead, tail).sum(dim=3, dtype=wide) / count).to(x.dtype)
    size = prod(cells)
    if weights.numel() != size or any(lead) or any(tail):
        raise ValueError(
            f"pool_keys got {weights.numel()} weights for cells {cells} on grid {grid}; pass {size} weights and cells "
            "that divide the grid."
        )
    weighted = _cells(x, grid, cells, lead, tail).to(wide) * weights.reshape(size, 1).to(wide)
    return weighted.sum(dim=3).to(x.dtype)


def pool_weighted(
    x: Tensor, grid: Axes, cells: Axes, log_weight: Tensor, shift: Axes = NO_SHIFT
) -> tuple[Tensor, Tensor]:
    """Weighted means of the tokens of every cell, and the logarithm of the weight of every cell.

    Args:
        x: [B, F*H*W, heads, D] tokens of `grid` (F, H, W) in raster order.
        cells, shift: as in `pool_keys`; ragged cells weight the tokens they have.
        log_weight: [B|1, heads|1, F*H*W] logarithms, -inf leaves a token out, whatever it holds.

    Returns:
        [B, number of cells, heads, D] in the dtype of x, 0 for cells without weight; [B|1, heads|1, number of cells]
        in fp32 or wider, -inf for those.
    """
    lead, tail = _margins(grid, cells, shift)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = log_weight.to(wide).transpose(1, 2)[..., None]
    weight = _cells(weight, grid, cells, lead, tail, float("-inf"))  # [B|1, cells, heads|1, n, 1]
    total = torch.logsumexp(weight, dim=3, keepdim=True)
    empty = torch.isneginf(total)
    share = torch.exp(weight - total.masked_fill(empty, 0.0))
    tokens = _cells(x, grid, cells, lead, tail).to(wide).masked_fill(share == 0, 0.0)
    return (tokens * share).sum(dim=3).to(x.dtype), total[..., 0, 0].transpose(1, 2)


def cell_counts(grid: Axes, cells: Axes, shift: Axes = NO_SHIFT, device: torch.device | str = "cpu") -> Tensor:
    """Tokens of every cell, int64 [number of cells] in raster order; arguments as in `pool_keys`."""
    axes = []
    for length, cell, before, after in zip(grid, cells, *_margins(grid, cells, shift), strict=True):
        count = torch.full(((length + before + after) // cell,), cell, device=device)
        count[0] -= before
        count[-1] -= after
        axes.append(count)
    return (axes[0][:, None, None] * axes[1][:, None] * axes[2]).reshape(-1)


def pool_runs(x: Tensor, order: Tensor, run: int, *, total: int | None = None, weights: Tensor | None = None) -> Tensor:
    """Means of `run` consecutive tokens of an ordered sequence.

    Args:
        x: [B, S, heads, D].
        order: int [L], tokens of x in the order of the sequence; the others are left out.
        run: tokens per mean. The last run may be shorter and averages the tokens it has.
        total: repeat the last token until there are `total` (a multiple of `run`) and average those too.
        weights: [B|1, L, heads|1, 1] not negative, for weighted means; runs of weight 0 give 0. Not with `total`.

    Returns:
        [B, ceil(L / run), heads, D] in the dtype of x, [B, total / run, heads, D] with `total`.

    Source: PSA, Li et al. 2512.04025 (repeats the last token).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if total is not None:
        order = torch.cat([order, order[-1:].expand(total - len(order))])
    ordered = x.index_select(1, order)
    if weights is None:
        weights = ordered.new_ones(1, len(order), 1, 1, dtype=wide)
    weight = _runs(weights.to(wide), run).sum(dim=2)
    sums = _runs(ordered.to(wide) * weights.to(wide), run).sum(dim=2)
    return (sums / weight.clamp_min(torch.finfo(wide).tiny)).to(x.dtype)


def proxy_tokens(
    x: Tensor,
    grid: Axes,
    window: Axes,
    scale: Axes = (1, 1, 1),
    mode: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Proxies of windows (PT-DiT, Wang et al. 2409.04005): one or several tokens that stand for every window.

    Args:
        x: [B, F*H*W, D] tokens of `grid` (F, H, W) in raster order.
        window: tokens per window and axis, a divisor of the grid.
        scale: proxies per window and axis, a divisor of the window. Proxy (t, u, v) stands for the tokens of the window
            whose coordinates have remainders (t, u, v) by `scale`: dilated sets.
        mode: "mean" of the set, its "first" token, or a "random" one, drawn once for all samples.
        generator: where "random" draws from; needed there.

    Returns:
        [B, windows * prod(scale), D], windows in raster order, the proxies of one window likewise.

    Raises:
        ValueError: sizes that do not divide, an unknown mode, or "random" without a generator.
    """
    if any(n % w or w % s for n, w, s in zip(grid, window, scale, strict=True)):
        raise ValueError(f"proxy_tokens: window {window} must divide grid {grid}, and scale {scale} the window.")
    count = [n // w for n, w in zip(grid, window, strict=True)]
    inner = [w // s for w, s in zip(window, scale, strict=True)]
    split = [size for axis in zip(count, inner, scale, strict=True) for size in axis]
    sets = x.reshape(x.shape[0], *split, x.shape[2]).permute(0, 1, 4, 7, 3, 6, 9, 2, 5, 8, 10)
    sets = sets.reshape(x.shape[0], prod(count) * prod(scale), prod(inner), x.shape[2])
    if mode == "mean":
        return sets.mean(dim=2)
    if mode == "first":
        return sets[:, :, 0]
    if mode != "random" or generator is None:
        raise ValueError(f"proxy_tokens mode={mode!r}: pass 'mean', 'first', or 'random' with a generator.")
    chosen = torch.randint(sets.shape[2], (sets.shape[1],), generator=generator, device=generator.device)
    return sets[:, torch.arange(sets.shape[1], device=x.device), chosen.to(x.device)]


def _margins(grid: Axes, cells: Axes, shift: Axes) -> tuple[list[int], list[int]]:
    """Places before the first and after the last token that complete the cells, per axis."""
    lead = [-first % cell for first, cell in zip(shift, cells, strict=True)]
    return lead, [-(length + before) % cell for length, before, cell in zip(grid, lead, cells, strict=True)]


def _cells(x: Tensor, grid: Axes, cells: Axes, lead: list[int], tail: list[int], fill: float = 0.0) -> Tensor:
    """[B, tokens, heads, D] as [B, number of cells, heads, prod(cells), D]; missing tokens are `fill`."""
    batch, _, heads, dim = x.shape
    x = x.reshape(batch, *grid, heads, dim)
    if any(lead) or any(tail):
        x = pad(x, (0, 0, 0, 0, lead[2], tail[2], lead[1], tail[1], lead[0], tail[0]), value=fill)
    counts = [size // cell for size, cell in zip(x.shape[1:4], cells, strict=True)]
    split = [size for pair in zip(counts, cells, strict=True) for size in pair]
    x = x.reshape(batch, *split, heads, dim).permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
    return x.reshape(batch, prod(counts), heads, -1, dim)


def _runs(x: Tensor, run: int) -> Tensor:
    """[B, L, heads, D] as [B, ceil(L / run), run, heads, D], the last run filled up with zeros."""
    missing = -x.shape[1] % run
    return pad(x, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, run))
