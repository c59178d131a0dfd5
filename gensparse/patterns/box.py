"""Box: a sliding window clipped at the borders."""

from dataclasses import dataclass

from gensparse.layout import Layout
from gensparse.patterns.axes import SeparableRule, band
from gensparse.patterns.base import NO_DATA, Data, Pattern, Rule
from gensparse.patterns.checks import PerAxis, per_axis, spread


@dataclass(frozen=True)
class Box(Pattern):
    """Keys at most `radius` tokens away on every axis: |dy|, |dx| (and |dt|) <= radius, clipped at the borders.

    Args:
        radius: one value for every axis, or one per axis, (H, W) or (F, H, W). It may exceed the grid.

    Raises:
        ConfigError: a radius that is not a positive integer, or a tuple that leaves out an axis (when bound).
    """

    radius: PerAxis

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", per_axis("Box radius", self.radius))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        radius = spread("Box radius", self.radius, layout.grid)
        return SeparableRule(layout, [band(*axis) for axis in zip(layout.grid, radius, strict=True)])
