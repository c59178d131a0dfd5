"""Attention whose logits about an object come from a second pass, without a matrix of all pairs (PrimeComposer).

Published as logits replaced before the softmax: columns of the object's tokens T by prior[i, m] = qp_i . kp_m, then its
rows by the transposed prior. Both are exact factorisations: a row outside of T is one softmax over keys outside of T
with its own query and keys in T with the query of the prior, merged by their log-sum-exp; row T[m] is plain attention
of the query kp_m over the keys qp_j of all tokens.
"""

import torch
from torch import Tensor

from gensparse.attention import sparse_attention
from gensparse.kernels.merge import merge_lse
from gensparse.layout import Layout
from gensparse.patterns import Policy, Reference, References
from gensparse.plan import build_plan

OBJECT, ALL = "object", "all"


def attend_steered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior_q: Tensor,
    prior_k: Tensor,
    target: Tensor,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Attention of pictures [B, N, H, D] steered by the logits of a prior pass (PrimeComposer, 2403.05053).

    Args:
        q, k, v: of the generated pictures, [B, N, H, D].
        prior_q: queries of the prior pass, [B, N, H, D].
        prior_k: keys of the object's tokens in the prior pass, [B, M, H, D].
        target: int64 [M], the object's tokens in the generated pictures, each once.
        scale: factor of all logits; None is 1/sqrt(D).
        key_bias: [B|1, H|1, N] added to the logits of the generated pictures' keys.

    Returns:
        [B, N, H, D]; without a token of the object it is plain attention.
    """
    rest = _others(target, q.shape[1])
    out = torch.empty_like(q)
    if len(rest):
        out[:, rest] = _around(q, k, v, prior_q, prior_k, target, rest, scale, key_bias)
    if len(target):
        # the prior transposed: keys of the object ask, queries of all tokens answer
        seen = (prior_q, v)
        out[:, target] = _sees(prior_k, ALL, seen, scale, key_bias)[0]
    return out


def _around(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior_q: Tensor,
    prior_k: Tensor,
    target: Tensor,
    rest: Tensor,
    scale: float | None,
    key_bias: Tensor | None,
) -> Tensor:
    """Rows of the tokens beside the object, [B, N - M, H, D]."""
    plan = build_plan(Policy((("target", "target"),)), Layout.image(1, len(rest)), device=q.device)
    bias = None if key_bias is None else key_bias[..., rest]
    own, own_lse = sparse_attention(
        q[:, rest], k[:, rest], v[:, rest], plan, scale=scale, key_bias=bias, return_lse=True
    )
    if not len(target):
        return own
    bias = None if key_bias is None else key_bias[..., target]
    told, told_lse = _sees(prior_q[:, rest], OBJECT, (prior_k, v[:, target]), scale, bias)
    return merge_lse(torch.stack([own, told]), torch.stack([own_lse, told_lse]))[0]


def _sees(
    q: Tensor, name: str, seen: tuple[Tensor, Tensor], scale: float | None, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, S, H, D] over the keys and values `seen` alone, and its log-sum-exp [B, S, H]."""
    tokens = q.shape[1]
    pattern = References((Reference(name, length=seen[0].shape[1]),))
    plan = build_plan(pattern, Layout.image(1, tokens), device=q.device)
    bias = None
    if key_bias is not None:  # of the keys behind those of the queries' own tokens, which nobody sees
        bias = torch.cat([key_bias.new_zeros(*key_bias.shape[:2], tokens), key_bias], -1)
    return sparse_attention(q, q, q, plan, scale=scale, key_bias=bias, sources={name: seen}, return_lse=True)


def _others(target: Tensor, tokens: int) -> Tensor:
    """The tokens that are not in `target`, int64 in order."""
    free = torch.ones(tokens, dtype=torch.bool, device=target.device)
    free[target] = False
    return free.nonzero()[:, 0]
