"""Shared style: what StyleAligned (2312.02133) does to queries and keys before it attends."""

import torch
from torch import Tensor

from gensparse.errors import ConfigError


def adain(x: Tensor, items: int, eps: float = 1e-5) -> Tensor:
    """Every item with the statistics of the first of its half, over its tokens, per channel; that one is kept.

    Args:
        x: [halves * items, N, ...], items of a half next to each other, the style reference first.
        items: items of a half.
        eps: added to the variance (unbiased) inside the root.
    """
    halves = _halves(x, items)
    mean = halves.mean(dim=2, keepdim=True)
    deviation = (halves.var(dim=2, keepdim=True, unbiased=True) + eps).sqrt()
    styled = (halves - mean) / deviation * deviation[:, :1] + mean[:, :1]
    return torch.cat([halves[:, :1], styled[:, 1:]], 1).flatten(0, 1)


def style_keys(x: Tensor, items: int, scale: float = 1.0) -> Tensor:
    """The first item of every half for all items of the half, as extra keys (or values, with scale 1).

    Args:
        x: [halves * items, N, H, D], after AdaIN.
        scale: factor of the keys the other items see; the first item sees its own copy unscaled.
    """
    halves = _halves(x, items)
    first = halves[:, :1]
    return torch.cat([first, (first * scale).expand_as(halves[:, 1:])], 1).flatten(0, 1)


def _halves(x: Tensor, items: int) -> Tensor:
    if items < 1 or x.shape[0] % items:
        raise ConfigError(f"{x.shape[0]} items do not split into halves of items={items}; pass the items of one half.")
    return x.unflatten(0, (-1, items))
