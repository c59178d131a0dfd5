"""Attention maps without a matrix of all pairs: columns of cross-attention, and self-attention times a few maps.

Methods look at where words act (ConsiStory, MasaCtrl, MagicFace). What they need of self-attention is its product with
such maps, which a pass over blocks of queries gives: never more than `BLOCK_BYTES` of weights at a time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 26
"""Attention weights that are held at once, 64 MiB."""


def cross_maps(q: Tensor, k: Tensor, tokens: Sequence[int] | None = None, scale: float | None = None) -> Tensor:
    """Probabilities of words, mean over heads, float32 [B, N, words].

    Args:
        q: [B, N, H, D] of the picture; k: [B, L, H, D] of the text.
        tokens: words whose columns are wanted; the softmax is over all of them. None for all.
        scale: factor of the logits; None is 1/sqrt(D).
    """
    kept = slice(None) if tokens is None else list(tokens)
    return torch.cat([weights.mean(1)[..., kept] for _, weights in _blocks(q, k, scale)], 1)


def self_times(q: Tensor, k: Tensor, maps: Tensor, scale: float | None = None) -> Tensor:
    """Head-averaged self-attention times maps, float32 [B, N, C]: (mean over heads of softmax(q k)) @ maps.

    Args:
        q, k: [B, N, H, D]; maps: [B, N, C].
    """
    maps = maps.float()
    return torch.cat([weights.mean(1) @ maps for _, weights in _blocks(q, k, scale)], 1)


def self_rows(q: Tensor, k: Tensor, groups: Tensor, scale: float | None = None) -> Tensor:
    """Where groups of tokens look: mean of their rows of head-averaged self-attention, float32 [B, G, N].

    Args:
        q, k: [B, N, H, D].
        groups: bool [G, N]; the row of a group without a token is 0.
    """
    found = torch.zeros(len(q), len(groups), k.shape[1], device=q.device)
    share = groups.to(q.device).float()
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1)
    for rows, weights in _blocks(q, k, scale):
        found = found + share[:, rows] @ weights.mean(1)
    return found


def token_map(maps: Tensor, tokens: Sequence[int]) -> Tensor:
    """Sum over words of maps [..., words], scaled to 0..1 in every picture (MasaCtrl); 0 where it is constant."""
    found = maps[..., list(tokens)].sum(-1)
    low, high = found.amin(-1, keepdim=True), found.amax(-1, keepdim=True)
    return (found - low) / (high - low).clamp(min=torch.finfo(found.dtype).tiny)


def otsu(values: Tensor, bins: int = 256) -> Tensor:
    """Otsu's threshold of the last axis: values above it are the brighter of the two classes that differ most.

    The centre of the bin at which the variance between the classes is largest, the first one of equals; for constant
    values the value itself.
    """
    flat = values.double().reshape(-1, values.shape[-1])
    return torch.stack([_otsu(row, bins) for row in flat]).reshape(values.shape[:-1]).to(values)


def _otsu(row: Tensor, bins: int) -> Tensor:
    low, high = row.min(), row.max()
    if low == high:
        return low
    counts = torch.histc(row.float(), bins, float(low), float(high)).double()
    centres = low + (torch.arange(bins, dtype=torch.float64, device=row.device) + 0.5) * (high - low) / bins
    below, above = counts.cumsum(0), counts.flip(0).cumsum(0).flip(0)
    mass = counts * centres
    mean_below = mass.cumsum(0) / below.clamp(min=1)
    mean_above = (mass.flip(0).cumsum(0).flip(0)) / above.clamp(min=1)
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]).square()
    return centres[between.argmax()]


def _blocks(q: Tensor, k: Tensor, scale: float | None) -> Iterator[tuple[slice, Tensor]]:
    """(queries, attention weights float32 [B, H, queries, keys]) block by block."""
    batch, tokens, heads, dim = q.shape
    factor = dim**-0.5 if scale is None else scale
    keys = k.float().repeat_interleave(heads // k.shape[2], dim=2)
    step = max(1, BLOCK_BYTES // (4 * batch * heads * k.shape[1]))
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        yield rows, torch.einsum("bqhd,bkhd->bhqk", q[:, rows].float() * factor, keys).softmax(-1)
