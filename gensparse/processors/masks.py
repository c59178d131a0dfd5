"""Attention masks a processor passes along: those over keys become a bias of the sparse call."""

import torch
from torch import Tensor


def key_bias(mask: Tensor) -> Tensor | None:
    """Bias [B|1, H|1, Nk] with the effect of `mask`, or None when the mask differs from query to query.

    Args:
        mask: [..., Nq|1, Nk] as scaled_dot_product_attention takes it, bool (True = visible) or added to the logits.
    """
    if mask.ndim < 2 or mask.ndim > 4 or mask.shape[-2] != 1:
        return None
    bias = mask.squeeze(-2)
    bias = bias.reshape((1,) * (3 - bias.ndim) + bias.shape)
    if bias.dtype is not torch.bool:
        return bias.float()
    return torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, float("-inf"))
