"""Shared style: what StyleAligned (2312.02133) and reference-only do to queries, keys and features."""

from collections.abc import Sequence

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


def shared_group_norm(
    x: Tensor, items: int, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm whose statistics are those of a picture and of the first of its half together (StyleAligned).

    Args:
        x: [halves * items, C, ...], items of a half next to each other, the style reference first.
        items: items of a half.
        groups, weight, bias, eps: of the norm.
    """
    halves = _halves(x, items)
    grouped = halves.unflatten(2, (groups, -1)).flatten(3).float()  # [halves, items, groups, values]
    own, spread = grouped.mean(-1), grouped.var(-1, unbiased=False)
    mean = (own + own[:, :1]) / 2
    spread = spread + (own - mean).square()
    first = grouped[:, :1].var(-1, unbiased=False) + (own[:, :1] - mean).square()
    deviation = ((spread + first) / 2 + eps).sqrt()
    normed = ((grouped - mean[..., None]) / deviation[..., None]).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    normed = normed if weight is None else normed * weight.float().view(shape)
    return (normed if bias is None else normed + bias.float().view(shape)).to(x.dtype)


def take_statistics(x: Tensor, items: int, shares: Sequence[float]) -> Tensor:
    """Feature maps with the mean and deviation of the first of their half over rows and columns (reference-only).

    Args:
        x: [halves * items, C, H, W], items of a half next to each other, the reference first; it is kept.
        items: items of a half.
        shares: for every half, how much of the result is styled; the rest is x.
    """
    halves = _halves(x, items)
    mean = halves.mean(dim=(3, 4), keepdim=True)
    deviation = halves.var(dim=(3, 4), keepdim=True, unbiased=False).clamp(min=1e-6).sqrt()
    styled = (halves - mean) / deviation * deviation[:, :1] + mean[:, :1]
    share = torch.tensor(shares, dtype=x.dtype, device=x.device).view(-1, 1, 1, 1, 1)
    mixed = torch.lerp(halves[:, 1:], styled[:, 1:], share.expand_as(halves[:, 1:]))
    return torch.cat([halves[:, :1], mixed], 1).flatten(0, 1)
