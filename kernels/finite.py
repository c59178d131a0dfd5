"""Masked products multiply hidden values by 0, which turns NaN and infinity into NaN for rows that never see them.

`contained` keeps them where they belong: rows that see a key with a non-finite entry become NaN, all others are as if
that key were 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def contained(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run `attend(q, k, v)` so that non-finite keys and values reach only the rows that see them."""
    if q.device.type != "cpu" or _all_finite(k, v):
        return attend(q, k, v)
    broken = ~(torch.isfinite(k).all(dim=-1, keepdim=True) & torch.isfinite(v).all(dim=-1, keepdim=True))
    out, lse = attend(q, k.masked_fill(broken, 0.0), v.masked_fill(broken, 0.0))
    share, _ = attend(torch.zeros_like(q), torch.zeros_like(k), broken.to(v.dtype).expand_as(v))
    hit = share[..., 0] > 0
    return out.masked_fill(hit[..., None], float("nan")), None if lse is None else lse.masked_fill(hit, float("nan"))


def _all_finite(k: Tensor, v: Tensor) -> bool:
    """One cheap pass: a sum is finite when every term is (and does not overflow, where the exact test decides)."""
    if all(bool(torch.isfinite(x.detach().sum())) for x in (k, v)):
        return True
    return all(bool(torch.isfinite(x).all()) for x in (k, v))
