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

_LARGE_DIM = 64  # below this the products are too thin to beat the fused kernel


def compute_dtype(q: Tensor) -> torch.dtype:
    """The dtype blocks are computed in: the CPU lacks fast fp16, and fast bf16 on most machines."""
    if q.device.type != "cpu" or q.dtype not in (torch.float16, torch.bfloat16):
        return q.dtype
    return torch.bfloat16 if q.dtype == torch.bfloat16 and _native_bf16() else torch.float32


def splits_scores(q: Tensor, keys: int, lse: bool) -> bool:
    """Whether blocks run as separate products (scores in memory) rather than fused."""
    fast = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    return lse or (fast and keys <= _SMALL_KEYS and q.shape[-1] >= _LARGE_DIM)


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
    wide = torch.promote_types(q.dtype, torch.float32)
    scores, shift = _scores(q, k, bias, scale)
    scores = scores.to(wide) if bias is None else scores + bias
    empty = torch.isneginf(bias).all(dim=-1, keepdim=True) if hide else None
    if empty is not None:  # a softmax over nothing is NaN, in its gradient too
        scores = scores.masked_fill(empty, 0.0)
    out = torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)
    total = torch.logsumexp(scores, dim=-1) + shift if lse else None
    if empty is None:
        return out, total
    return out.masked_fill(empty, 0.0), total.masked_fill(empty[..., 0], float("-inf")) if lse else None


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor | float]:
    """scale * q k^T - shift in q.dtype [heads, blocks, queries, keys], and the shift, which a softmax ignores.

    A product rounded to half precision is off by a fraction of itself, so rows are moved by about their maximum before
    rounding: logits that carry weight become small. The keys in the middle, nearest to the queries, give the estimate;
    hidden ones have no say, and rows that see none of them stay where they are.
    """
    q3, k3 = q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
    if q.dtype.itemsize > 2:
        return torch.baddbmm(q3.new_zeros(1), q3, k3, beta=0, alpha=scale).unflatten(0, q.shape[:2]), 0.0
    keys = k.shape[2]
    middle = slice(keys * 3 // 8, max(keys * 5 // 8, keys * 3 // 8 + 1))
    with torch.no_grad():
        near = torch.baddbmm(q3.new_zeros(1), q3, k3[:, :, middle], beta=0, alpha=scale).unflatten(0, q.shape[:2])
        near = near if bias is None else near.add_(bias[..., middle].to(q.dtype))
        shift = near.amax(dim=-1, keepdim=True)
        shift = shift.masked_fill(torch.isinf(shift), 0.0)
    scores = torch.baddbmm(-shift.flatten(0, 1).expand(-1, -1, keys), q3, k3, alpha=scale)
    return scores.unflatten(0, q.shape[:2]), shift.float()[..., 0]


@cache
def _native_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())
