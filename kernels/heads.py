"""Layout of the arguments of an attention call: heads first, every head with its own keys."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """q, k, v as [B*H, S, D] with contiguous tokens, and key_bias in at least fp32 [B*H, Nk] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None

    def take(self, rows: Tensor | slice | None) -> "Heads":
        """The heads `rows` of the flattened batch-and-head axis, all of them for None."""
        if rows is None:
            return self
        return Heads(self.q[rows], self.k[rows], self.v[rows], None if self.bias is None else self.bias[rows])


def heads_first(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Heads:
    """Flatten [B, S, H, D] to [B*H, S, D]; key and value heads are repeated when q has more (grouped queries)."""
    batch, _, heads, _ = q.shape
    repeat = heads // k.shape[2]
    k, v = (_flat(x if repeat == 1 else x.repeat_interleave(repeat, dim=2)) for x in (k, v))
    bias = None if key_bias is None else bias_of_heads(q, key_bias).reshape(batch * heads, -1)
    return Heads(_flat(q), k, v, bias)


def bias_of_heads(q: Tensor, key_bias: Tensor) -> Tensor:
    """key_bias [B|1, H|1, Nk] in at least fp32 for every sample and head of q: [B, H, Nk]."""
    return key_bias.to(torch.promote_types(q.dtype, torch.float32)).expand(q.shape[0], q.shape[2], -1)


def heads_last(x: Tensor, batch: int) -> Tensor:
    """[B*H, S, ...] back to [B, S, H, ...] (a view)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def group_rows(groups: Tensor | None, count: int, batch: int, heads: int) -> list[Tensor | None]:
    """Rows of the flattened batch-and-head axis for every entry of a menu; None stands for all rows.

    `groups` is an integer tensor [B|1, H|1]; a menu of one entry needs none.
    """
    if count == 1:
        return [None]
    flat = groups.expand(batch, heads).reshape(-1)
    return [torch.nonzero(flat == entry).reshape(-1) for entry in range(count)]


def in_order(parts: Sequence[Tensor], rows: Sequence[Tensor | None]) -> Tensor:
    """Results of the heads `rows`, concatenated in that order, back in the order of the heads."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if rows[0] is None:
        return joined
    return joined[torch.argsort(torch.cat(list(rows)))]


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]).contiguous()  # gathers would copy anything else
