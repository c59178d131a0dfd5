"""Attention couple: cross-attention to one prompt per region, each with its own softmax, summed with weights.

Used by regional prompting on UNets (cgem156-ComfyUI, sd-webui-regional-prompter). Texts may differ in length.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.subjects.masks import to_grid

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def couple_weights(masks: Tensor, base_weight: float, grid: tuple[int, int]) -> Tensor:
    """Weight of every layer at every token, float32 [R + 1, rows * columns], the base prompt first; they sum to 1.

    Args:
        masks: [R, H, W] in 0..1, weights of the regions included, at the size of the picture.
        base_weight: weight of the base prompt everywhere, 0..1; with 0 it fills the pixels that no region covers.
        grid: (rows, columns) of the attention layer.

    Raises:
        ConfigError: a base weight outside 0..1, or masks with negative or no finite values.
    """
    if not 0 <= base_weight <= 1:
        raise ConfigError(f"base_weight={base_weight!r} is not allowed; pass a number from 0 to 1.")
    if masks.dim() != 3 or not bool((masks >= 0).all() & masks.isfinite().all()):
        raise ConfigError(f"region masks of shape {tuple(masks.shape)} are not allowed; pass [R, H, W] in 0..1.")
    masks = masks.float()
    covered = masks.sum(dim=0, keepdim=True)
    base = torch.full_like(covered, base_weight) if base_weight else (covered == 0).float()
    layers = torch.cat([base, masks])
    return to_grid(layers / layers.sum(dim=0, keepdim=True), grid, "nearest-exact").flatten(1)


def region_sum(q: Tensor, texts: Sequence[tuple[Tensor, Tensor]], weights: Tensor, attend: Attend) -> Tensor:
    """Sum over the layers of weight * attend(q, k, v).

    Args:
        q: [B, N, H, D].
        texts: (k, v) of every layer, [B, L, H, D].
        weights: [R + 1, N] of `couple_weights`; layers of weight 0 everywhere are not attended.
        attend: plain or sparse attention, from q, k, v to [B, N, H, D].

    Raises:
        ConfigError: another number of texts or tokens than the weights have.
    """
    if weights.shape != (len(texts), q.shape[1]):
        raise ConfigError(
            f"weights of shape {tuple(weights.shape)} do not fit {len(texts)} texts and {q.shape[1]} queries; pass one "
            "row per text, base first."
        )
    total = torch.zeros_like(q)
    for (k, v), weight in zip(texts, weights.to(q.dtype), strict=True):
        if bool(weight.any()):
            total = total + weight[:, None, None] * attend(q, k, v)
    return total


def hard_regions(weights: Tensor) -> Tensor | None:
    """The weights as bool [R + 1, N] when every token has one layer, which one masked call can serve; else None."""
    return weights > 0 if bool(((weights == 0) | (weights == 1)).all()) else None
