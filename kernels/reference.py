"""The oracle: dense masked attention, written as the definition reads. It takes a mask and never a plan."""

import torch
from torch import Tensor

from .need import Need

LIMIT = 16384  # tokens; above this the mask alone is > 256 MB


def why_not(need: Need) -> str | None:
    """Why the dense oracle cannot serve a call, or None."""
    if max(need.queries, need.keys) > LIMIT:
        return (
            f"Can't run reference; it builds all {need.queries} x {need.keys} pairs and allows {LIMIT} tokens: use "
            "another backend."
        )
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    *,
    groups: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the allowed pairs, computed in at least fp32.

    Args:
        q, k, v: [B, S, H, D]; k and v may have fewer heads (a divisor of H) and another S.
        allowed: bool, [Nq, Nk], [G, Nq, Nk] or broadcastable to [B, H, Nq, Nk].
        groups: integer [B|1, H|1] picking one of G masks; with G = 1 none is needed.
        key_bias: [B|1, H|1, Nk] added to the logits.
        scale: factor of the logits, 1/sqrt(D) by default.

    Returns:
        out [B, Nq, H, D] in q.dtype and lse [B, Nq, H] in the compute dtype (fp32, or fp64 for fp64 input). Rows
        without an allowed key give 0 and -inf.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeat = q.shape[2] // k.shape[2]
    qh, kh, vh = (x.transpose(1, 2).to(compute) for x in (q, k, v))
    kh, vh = (x.repeat_interleave(repeat, dim=1) for x in (kh, vh))
    scores = scale * (qh @ kh.transpose(-1, -2))
    if key_bias is not None:
        scores = scores + key_bias.to(compute)[:, :, None, :]
    scores = scores.masked_fill(~_per_head(allowed, groups), float("-inf"))
    empty = torch.isneginf(scores).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    out = (torch.softmax(scores, dim=-1) @ vh).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(empty[..., 0], float("-inf"))
    return out.transpose(1, 2).to(q.dtype), lse.transpose(1, 2)


def _per_head(allowed: Tensor, groups: Tensor | None) -> Tensor:
    """The mask as [B|1, H|1, Nq, Nk]."""
    if allowed.dim() == 4:
        return allowed
    if allowed.dim() == 2:
        return allowed[None, None]
    return allowed[groups] if groups is not None else allowed[:1, None]
