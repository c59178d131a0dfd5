"""Masks: from pictures to token grids, and the keys they keep. Grids are (rows, columns), never the root of a count."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.errors import ConfigError

MODES = ("nearest", "nearest-exact", "bilinear")


def to_grid(mask: Tensor, grid: tuple[int, int], mode: str = "nearest", threshold: float | None = None) -> Tensor:
    """Masks [..., H, W] on a token grid, [..., rows, columns].

    Args:
        grid: (rows, columns).
        mode: "nearest" takes pixel floor(i * H / rows) (FreeCustom 2405.13870, MagicFace 2408.07433, MasaCtrl
            2304.08465), "nearest-exact" the pixel under the centre of the token (Regional-Prompting-FLUX 2411.02395),
            "bilinear" weighs four pixels (IR-Diffusion 2411.19261) and gives float32.
        threshold: give bool, True where the result is above it; None keeps the values.

    Raises:
        ConfigError: an unknown mode, a mask with fewer than two axes, or a grid that is not two positive integers.
    """
    if mode not in MODES:
        raise ConfigError(f"to_grid mode={mode!r} is not allowed; pass one of {', '.join(MODES)}.")
    if mask.dim() < 2 or not mask.numel():
        raise ConfigError(f"to_grid got a mask of shape {tuple(mask.shape)}; pass [..., height, width].")
    if len(grid) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in grid):
        raise ConfigError(f"to_grid grid={grid!r} is not allowed; pass two positive integers (rows, columns).")
    planes = mask.reshape(1, -1, *mask.shape[-2:]).float()
    settings = {"align_corners": False} if mode == "bilinear" else {}
    resized = F.interpolate(planes, size=tuple(grid), mode=mode, **settings).reshape(*mask.shape[:-2], *grid)
    if threshold is not None:
        return resized > threshold
    return resized if mode == "bilinear" else resized.to(mask.dtype)


def token_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A mask [H, W] on a token grid, bool [rows, columns], as IR-Diffusion (2411.19261) makes it.

    Four pixels are weighed, and tokens that reach more than three quarters of the largest value count: in practice
    those whose four pixels are all inside.
    """
    resized = to_grid(mask, grid, "bilinear")
    low, high = resized.min(), resized.max()
    if high == low:
        return resized > 0.5
    return (resized - low) / (high - low) > 0.75


def last_wins(regions: Tensor) -> Tensor:
    """Masks bool [R, ...] made disjoint: a token of several regions stays in the last of them (MagicFace)."""
    regions = regions.bool()
    later = regions.flip(0).cumsum(0).flip(0) - regions.long()
    return regions & (later == 0)


def apart(regions: Tensor, owners: Sequence[int]) -> Tensor:
    """Masks bool [R, ...] made disjoint between owners, see `last_wins`; those of one owner are one region together.

    Args:
        owners: number of whom each region belongs to, from 0.
    """
    regions = regions.bool()
    belongs = torch.tensor(owners, device=regions.device)
    whole = torch.stack([regions[belongs == owner].any(0) for owner in range(max(owners) + 1)])
    return last_wins(whole)[belongs]


def gather_keys(k: Tensor, v: Tensor, keep: Tensor, multiple: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values a mask keeps, padded to the longest sample and to a multiple, so that plans can be shared.

    Attention over them with the bias equals attention over all keys under the mask, at the cost of the kept ones.

    Args:
        k, v: [B, N, H, D].
        keep: bool [N] or [B, N].
        multiple: tokens that the result's length is a multiple of.

    Returns:
        k and v [B, M, H, D], and what to add to their logits, float32 [B, 1, M]: 0, or -inf for padding.
    """
    keep = keep.bool().expand(k.shape[0], k.shape[1])
    counts = keep.sum(dim=1)
    length = max(1, -(-int(counts.max()) // multiple)) * multiple
    order = torch.argsort(~keep, dim=1, stable=True)[:, : min(length, k.shape[1])]
    kept = [F.pad(_rows(x, order), (0, 0, 0, 0, 0, length - order.shape[1])) for x in (k, v)]
    empty = torch.arange(length, device=k.device) >= counts[:, None]
    return kept[0], kept[1], torch.zeros(empty.shape, device=k.device).masked_fill(empty, float("-inf"))[:, None]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """[B, N, H, D] at token indices [B, M]."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))
