"""Sliding window: a box of keys around every query, cut at the borders of the picture."""

from dataclasses import dataclass
from typing import ClassVar

from gensparse.layout import Layout
from gensparse.methods.base import START, At, Method
from gensparse.methods.checks import all_frames
from gensparse.methods.pictures import over_pictures
from gensparse.patterns import Box, Pattern


@dataclass(frozen=True)
class SlidingWindow(Method):
    """Picture tokens see text and the tokens with |dy|, |dx| (and |dt|) <= radius; text sees everything.

    References of the target's grid are seen through the same window, others wholly (see `methods.pictures`).

    Args:
        radius: in tokens, one for all axes or one per axis (H, W) or (F, H, W); (H, W) on clips means all frames.

    Raises:
        ConfigError: a radius is not a positive integer.
    """

    name: ClassVar[str] = "sliding_window"
    paper: ClassVar[str] = (
        "the plain local window, as in Stand-Alone Self-Attention 1906.05909 and Longformer 2004.05150"
    )
    licence: ClassVar[str] = "nothing of others"
    use: ClassVar[str] = "A baseline: a box around every token, cut at borders."
    edits: ClassVar[bool] = True

    radius: int | tuple[int, ...] = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", Box(self.radius).radius)

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        frames = layout.grid[0]
        radius = all_frames(self.radius, frames) if frames > 1 else self.radius
        return over_pictures(Box(radius), layout).clamped(layout.grid)
