"""Halo backend: query tiles of a grid with one box of keys each, gathered and attended in batches.

A tile and its keys are a start index plus offsets that all tiles of a class share, so the lowered form of a 4096 x 4096
picture is a few kilobytes and its masks stay in the cache. Memory beyond q, k, v and the output:
`blocks.CHUNK_BYTES` per pair of threads (one tile at least), and heads-first copies of q, k, v where blocks are not
fused or heads differ in pattern.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .blocks import Work, attend_works
from .need import Need


@dataclass(frozen=True)
class TileClass:
    """Query tiles of one shape whose keys lie at the same offsets.

    Args:
        q_start, k_start: int64 [n], index of the first query and of the first key of every tile.
        q_offset, k_offset: int64 [tq], [tk], distance of the others from it.
        shared: int64 [ts], keys every tile sees (text, pooled), counted after the box's.
        mask: bool [tq, tk], visible pairs inside the box, or None when all are visible.
        hides: whether some query of the tile sees none of its keys.
    """

    q_start: Tensor
    q_offset: Tensor
    k_start: Tensor
    k_offset: Tensor
    shared: Tensor
    mask: Tensor | None
    hides: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self.q_start), len(self.q_offset), len(self.k_offset) + len(self.shared)

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        queries = self.q_start[start:stop, None] + self.q_offset
        keys = self.k_start[start:stop, None] + self.k_offset
        if len(self.shared):
            keys = torch.cat([keys, self.shared.expand(len(keys), -1)], dim=1)
        return queries, keys

    def bias(self) -> tuple[Tensor | None, bool]:
        if self.mask is None:
            return None, False
        additive = self.mask.new_zeros(self.sizes[1:], dtype=torch.float32)
        additive[:, : len(self.k_offset)].masked_fill_(~self.mask, float("-inf"))
        return additive, self.hides

    def to(self, device: torch.device) -> "TileClass":
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)})


def why_not(need: Need) -> str | None:
    """Why the halo backend cannot serve a call, or None."""
    reason = need.refused.get("halo")
    return f"Can't run halo; {reason}" if reason else None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    works: Sequence[Work],
    *,
    groups: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of tiles with their boxes of keys.

    Args:
        q, k, v: [B, S, H, D], any strides; k and v may have fewer heads and extra keys at the end.
        works: per entry of the pattern menu, classes of tiles and dense rows.
        groups: integer [B|1, H|1] picking the entry of every head.
        key_bias: [B|1, H|1, Nk] added to the logits.
        scale: factor of the logits, 1/sqrt(D) by default.

    Returns:
        out [B, Nq, H, D] in q.dtype; lse fp32 [B, Nq, H] or None. Rows without a key give 0 and -inf.
    """
    return attend_works(q, k, v, works, groups=groups, key_bias=key_bias, scale=scale, return_lse=return_lse)
