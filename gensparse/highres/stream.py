"""Softmax attention in blocks of queries and keys: one head of 512 channels over a million tokens, no N x N matrix.

Autoencoders have such an attention in their middle. Few fused kernels take a head that wide, and what runs in their
place makes the matrix. The running softmax of Milakov & Gimelshein (arXiv 1805.02867), in float32.
"""

import math

import torch

QUERIES, KEYS = 4096, 8192  # tokens of a block: scores of 128 MiB


def streamed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, queries: int = QUERIES, keys: int = KEYS
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for q [H, N, d], k [H, M, d], v [H, M, e]; the result has the dtype of `q`.

    Args:
        queries, keys: tokens of a block; the largest matrix is [H, queries, keys] in float32.
    """
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for start in range(0, q.shape[-2], queries):
        part = slice(start, start + queries)
        out[:, part] = _rows(q[:, part].float() / math.sqrt(q.shape[-1]), k, v, keys).to(q.dtype)
    return out


def _rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: int) -> torch.Tensor:
    """The result of some rows, float32: sums are rescaled whenever a block of keys brings a larger score."""
    highest = q.new_full((*q.shape[:-1], 1), -math.inf)
    weight, mixed = torch.zeros_like(highest), q.new_zeros(*q.shape[:-1], v.shape[-1])
    for start in range(0, k.shape[-2], keys):
        part = slice(start, start + keys)
        scores = q @ k[:, part].float().transpose(-1, -2)
        above = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        fade = (highest - above).exp_()
        scores.sub_(above).exp_()
        weight = weight * fade + scores.sum(dim=-1, keepdim=True)
        mixed = torch.baddbmm(mixed.mul_(fade), scores, v[:, part].float())
        highest = above
    return mixed.div_(weight)
