"""Attention of small dense blocks, the inner step of every torch backend.

Two ways, chosen by dtype and size only, never by free memory, so that a call gives the same bits everywhere:
scaled_dot_product_attention, which keeps the scores in registers and is fastest in fp32; and two matrix products with a
softmax in fp32 between them, which is fastest in bf16 on CPUs with bf16 instructions and gives the log-sum-exp.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_BYTES = 1 << 25  # scores of one matrix product that are held at once, 32 MiB
_SMALL_KEYS = 4096  # above this a row of scores leaves the cache and the fused kernel wins


def compute_dtype(q: Tensor) -> torch.dtype:
    """The dtype blocks are computed in: the CPU lacks fast fp16, and fast bf16 on most machines."""
    if q.device.type != "cpu" or q.dtype not in (torch.float16, torch.bfloat16):
        return q.dtype
    return torch.bfloat16 if q.dtype == torch.bfloat16 and _native_bf16() else torch.float32


def splits_scores(q: Tensor, keys: int, lse: bool) -> bool:
    """Whether blocks run as separate products (scores in memory) rather than fused."""
    return lse or (q.dtype == torch.bfloat16 and q.device.type == "cpu" and keys <= _SMALL_KEYS)


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, *, lse: bool, may_hide: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention inside blocks.

    Args:
        q: [heads, blocks, queries, D]; k, v: the same with keys.
        bias: additive, -inf for hidden pairs, broadcastable to [heads, blocks, queries, keys]; None for all visible.
        lse: whether the log-sum-exp is wanted.
        may_hide: whether `bias` may hide all keys of a query.

    Returns:
        out like q, lse fp32 [heads, blocks, queries] or None. Rows without a key give 0 and -inf.
    """
    if not splits_scores(q, k.shape[2], lse):
        mask = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None
    hide = bias is not None and may_hide
    rows = max(1, SCORE_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
    if rows >= q.shape[2]:
        return _by_products(q, k, v, bias, scale, lse, hide)
    shared = bias is None or bias.shape[-2] == 1
    parts = [
        _by_products(q[:, :, i : i + rows], k, v, bias if shared else bias[..., i : i + rows, :], scale, lse, hide)
        for i in range(0, q.shape[2], rows)
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([part for _, part in parts], 2) if lse else None


def _by_products(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, lse: bool, hide: bool
) -> tuple[Tensor, Tensor | None]:
    scores = torch.matmul(q, k.transpose(-1, -2))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scores.to(wide) * scale if bias is None else torch.add(bias, scores, alpha=scale)
    empty = torch.isneginf(bias).all(dim=-1, keepdim=True) if hide else None
    if empty is not None:  # a softmax over nothing is NaN, in its gradient too
        scores = scores.masked_fill(empty, 0.0)
    out = torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)
    total = torch.logsumexp(scores, dim=-1) if lse else None
    if empty is None:
        return out, total
    return out.masked_fill(empty, 0.0), total.masked_fill(empty[..., 0], float("-inf")) if lse else None


@cache
def _native_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())
