"""Partial attention results joined by their log-sum-exp."""

import torch
from torch import Tensor


def merge_lse(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Join results over disjoint key sets into the result over their union (exact).

    Args:
        outs: [P, ..., D] normalised outputs of P parts.
        lses: [P, ...] natural log-sum-exp of each part's logits; -inf where a part saw no key.

    Returns:
        out [..., D] in the dtype of `outs` and lse [...] in that of `lses`; rows no part saw give 0 and -inf.

    Source: NATTEN, attn_merge.
    """
    nothing = torch.isneginf(lses).all(dim=0)  # kept out of the arithmetic, whose gradient would be NaN
    parts = lses.masked_fill(nothing, 0.0)
    lse = torch.logsumexp(parts, dim=0)
    weight = torch.softmax(parts, dim=0).masked_fill(nothing, 0.0)
    out = (weight[..., None] * outs.to(weight.dtype)).sum(dim=0)
    return out.to(outs.dtype), lse.masked_fill(nothing, float("-inf"))
