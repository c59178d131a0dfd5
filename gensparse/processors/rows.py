"""Exact attention of a few queries: what windows lose, without a matrix of all pairs."""

import math

import torch
from torch import Tensor


def sample_rows(first: int, count: int, rows: int, seed: int, device: torch.device) -> Tensor:
    """`rows` different tokens (all, if there are fewer) of the `count` that start at `first`, one from each stretch."""
    rows = min(rows, count)
    generator = torch.Generator().manual_seed(seed)
    edges = torch.arange(rows + 1, dtype=torch.float64) * (count / rows)
    low, high = edges[:-1].ceil(), edges[1:].ceil()
    picked = low + (torch.rand(rows, generator=generator, dtype=torch.float64) * (high - low)).floor()
    return (first + picked.long()).to(device)


def weights_of(q: Tensor, k: Tensor, rows: Tensor, scale: float | None, key_bias: Tensor | None) -> Tensor:
    """Attention weights fp32 [B, H, R, S] of the queries `rows`, for q, k [B, S, H, D] (k may have fewer heads)."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    keys = k.float().repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    logits = torch.einsum("brhd,bshd->bhrs", q[:, rows].float() * scale, keys)
    if key_bias is not None:
        logits = logits + key_bias[:, :, None]
    return logits.softmax(-1)


def outputs_of(weights: Tensor, v: Tensor) -> Tensor:
    """Outputs fp32 [B, H, R, D] of attention weights [B, H, R, S] and v [B, S, H, D]."""
    values = v.float().repeat_interleave(weights.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhrs,bshd->bhrd", weights, values)
