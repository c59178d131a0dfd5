"""A bank of keys and values: what sites keep of one denoiser call, to be seen as key sources in later ones.

Anchors of a low-resolution picture are recorded once for all steps, references of other pictures once per picture or
step. What is kept comes after norms and rotary embedding, as the attention call receives it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gensparse.layout import Segment

Pair = tuple[Tensor, Tensor]


class Bank:
    """Keys and values by source and site.

    Args:
        device: where they are kept; None where they are computed. On another device they are copied at every use.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._device = device
        self._segments: dict[str, dict[str, Segment]] = {}
        self._kept: dict[str, dict[str, Pair]] = {}

    def keep(self, role: str, site: str, segment: Segment, k: Tensor, v: Tensor) -> None:
        """Keep k and v [B, tokens, H, D] of a site as the source `segment.name`, instead of what it had."""
        self._segments.setdefault(role, {})[segment.name] = segment
        pair = tuple(x.detach().to(self._device or x.device, copy=True) for x in (k, v))
        self._kept.setdefault(site, {})[segment.name] = (pair[0], pair[1])

    def segments(self, role: str) -> tuple[Segment, ...]:
        """The sources that sites of a role have kept."""
        return tuple(self._segments.get(role, {}).values())

    def sources(self, site: str) -> dict[str, Pair]:
        """The sources of one site, by name."""
        return dict(self._kept.get(site, {}))

    @property
    def bytes(self) -> int:
        """Memory of everything kept."""
        return sum(x.numel() * x.element_size() for own in self._kept.values() for pair in own.values() for x in pair)


class Record(NamedTuple):
    """What the sites of a role keep of their calls: the tokens of `segment`, the first at `start`."""

    bank: Bank
    role: str
    segment: Segment
    start: int

    @torch.compiler.disable
    def keep(self, site: str, k: Tensor, v: Tensor) -> None:
        """Keep the part of k and v [B, S, H, D] that was asked for."""
        part = slice(self.start, self.start + self.segment.length)
        self.bank.keep(self.role, site, self.segment, k[:, part], v[:, part])
