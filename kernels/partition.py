"""Partition backend: windows that attend only themselves (and shared keys), gathered and attended without a mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Work, attend_works
from .need import Need


@dataclass(frozen=True)
class Windows:
    """Windows of equal size.

    Args:
        tokens: int64 [n, w], the tokens of every window, its queries and its keys.
        shared: int64 [ts], keys every window sees (text, pooled).
    """

    tokens: Tensor
    shared: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        number, window = self.tokens.shape
        return number, window, window + len(self.shared)

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        own = self.tokens[start:stop]
        if not len(self.shared):
            return own, own
        return own, torch.cat([own, self.shared.expand(len(own), -1)], dim=1)

    def bias(self) -> tuple[None, bool]:
        return None, False

    def to(self, device: torch.device) -> "Windows":
        return Windows(self.tokens.to(device), self.shared.to(device))


def why_not(need: Need) -> str | None:
    """Why the partition backend cannot serve a call, or None."""
    reason = need.refused.get("partition")
    return f"Can't run partition; {reason}" if reason else None


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
    """Attention inside windows; arguments and results as for the halo backend, with `Windows` as tiles."""
    return attend_works(q, k, v, works, groups=groups, key_bias=key_bias, scale=scale, return_lse=return_lse)
