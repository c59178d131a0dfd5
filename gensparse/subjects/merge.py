"""Several image prompts merged position by position: where each object's name is relevant (MIP-Adapter, 2409.17920)."""

import torch
from torch import Tensor


def relevance(q: Tensor, k: Tensor, lengths: Tensor, scale: float | None = None) -> Tensor:
    """How much of an object's name is at every query: softmax over the queries, mean over heads and the name's tokens.

    Args:
        q: [B, N, H, D]; k: [B, L, H, D] of the object's name, encoded like a prompt of its own.
        lengths: [B], tokens of the name, which follow the begin token.
        scale: of the logits; None is 1/sqrt(D).

    Returns:
        fp32 [B, N]; every row sums to 1.
    """
    lengths = lengths.to(q.device).clamp(min=1, max=k.shape[1] - 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    longest = int(lengths.max())
    logits = torch.einsum("bthd,bnhd->bhtn", k[:, 1 : longest + 1].float() * scale, q.float())
    found = logits.softmax(-1).mean(1)
    counts = torch.arange(longest, device=q.device) < lengths[:, None]
    return (found * counts[:, :, None]).sum(1) / lengths[:, None]


def shares(relevances: Tensor, regions: Tensor | None = None) -> Tensor:
    """Relevances [B, K, N] as shares that sum to 1 over the objects; with regions [K, N], of those allowed there.

    Where no region allows any object all shares are 0.
    """
    if regions is not None:
        relevances = relevances * regions.to(relevances)
    total = relevances.sum(1, keepdim=True)
    return torch.where(total > 0, relevances / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def gate(text: Tensor, weight: Tensor) -> Tensor:
    """How much of the image prompts a query takes, by the text's own output: fp32 [B, N], 1 on average.

    Args:
        text: [B, N, C], heads merged.
        weight: [C], `text_to_weight` of the checkpoint; zeros give 1 everywhere.
    """
    value = (text.float() @ weight.float()).sigmoid()
    return value / value.mean(-1, keepdim=True)
