"""Long distance: windows in one layer, evenly spread tokens in the next (CrossFormer, Wang et al. 2108.00154)."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from gensparse import patterns
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Method, Place
from gensparse.methods.pictures import over_pictures
from gensparse.patterns import Blocks, Pattern
from gensparse.patterns.checks import per_axis

SHORT, LONG = "short", "long"


@dataclass(frozen=True)
class LongDistance(Method):
    """Picture tokens see text and, in even layers, their window; in odd layers every `interval`-th token around it.

    Even layers are CrossFormer's short-distance attention: windows of `group` tokens per axis. Odd layers are its
    long-distance attention: regions of group x interval tokens, in which tokens with equal remainders by the interval
    see each other. It reaches the whole picture only where the interval is length / group. Layers are counted over the
    attention layers of the model. Windows and regions at the end of an axis are ragged. CrossFormer's trained position
    bias is not part of it. The defaults are those of its first stage.

    References of the target's grid are seen through the same windows, others wholly (see `methods.pictures`).

    Args:
        group: tokens per axis that see each other, one value or (H, W) or (F, H, W).
        interval: distance between them in odd layers, likewise.

    Raises:
        ConfigError: group or interval is not a positive integer.
    """

    name: ClassVar[str] = "long_distance"
    paper: ClassVar[str] = (
        "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention (Wang et al.), arXiv 2108.00154"
    )
    licence: ClassVar[str] = "code MIT; no weights used"
    use: ClassVar[str] = "experiments that need far tokens without pooled keys"
    edits: ClassVar[bool] = True

    group: int | tuple[int, ...] = 7
    interval: int | tuple[int, ...] = 8

    def __post_init__(self) -> None:
        for field in ("group", "interval"):
            object.__setattr__(self, field, per_axis(f"{self.name} {field}", getattr(self, field)))

    def kind(self, place: Place) -> Hashable:
        return LONG if place.layer % 2 else SHORT

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        own = patterns.LongDistance(self.group, self.interval) if at.kind == LONG else Blocks(self.group)
        return over_pictures(own, layout).clamped(layout.grid)
