"""Neighborhood attention as NATTEN defines it (NA 2204.07143, DiNA 2209.15001, GNA 2504.16922)."""

from dataclasses import dataclass

from gensparse.layout import Grid, Layout
from gensparse.patterns.axes import SeparableRule, neighborhood
from gensparse.patterns.base import NO_DATA, Data, Pattern, Rule
from gensparse.patterns.checks import PerAxis, PerAxisOrWhole, flags, not_above, per_axis, spread, windows


@dataclass(frozen=True)
class Neighborhood(Pattern):
    """A window around every query that shifts inwards at the borders, so that it always holds prod(window) keys.

    Each setting is one value, which counts on every axis longer than one token, or one entry per axis, (H, W) or
    (F, H, W).

    Args:
        window: keys per axis; None for the whole axis. An even window has one key more before its leader than after.
        stride: queries per axis that share the window of their middle one (even: the right one of the two).
        dilation: keys lie this many tokens apart; window and stride count in such steps.
        causal: keys end at the query (early queries see fewer).

    Raises:
        ConfigError: a value that is not a positive integer, a stride above the window, or (when bound) a window times
            dilation longer than its axis.
    """

    window: PerAxisOrWhole
    stride: PerAxis = 1
    dilation: PerAxis = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", per_axis("Neighborhood window", self.window, whole=True))
        object.__setattr__(self, "stride", per_axis("Neighborhood stride", self.stride))
        object.__setattr__(self, "dilation", per_axis("Neighborhood dilation", self.dilation))
        object.__setattr__(self, "causal", flags("Neighborhood causal", self.causal))
        not_above("Neighborhood stride", self.stride, "window", self.window)

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        grid = layout.grid
        dilation = spread("Neighborhood dilation", self.dilation, grid)
        window = windows("Neighborhood window", self.window, grid, dilation)
        stride = spread("Neighborhood stride", self.stride, grid)
        not_above("Neighborhood stride", stride, "window", window)
        causal = spread("Neighborhood causal", self.causal, grid, single=False)
        return SeparableRule(
            layout, [neighborhood(*axis) for axis in zip(grid, window, stride, dilation, causal, strict=True)]
        )

    def clamped(self, grid: Grid) -> "Neighborhood":
        """Windows cut to the axis, then dilations to what the window leaves room for, then strides to the window."""
        given = spread("Neighborhood window", self.window, grid)
        window = tuple(None if w is None else min(w, length) for w, length in zip(given, grid, strict=True))
        room = [length if w is None else length // w for w, length in zip(window, grid, strict=True)]
        dilation = tuple(map(min, spread("Neighborhood dilation", self.dilation, grid), room))
        most = [length // d if w is None else w for w, d, length in zip(window, dilation, grid, strict=True)]
        stride = tuple(map(min, spread("Neighborhood stride", self.stride, grid), most))
        causal = spread("Neighborhood causal", self.causal, grid, single=False)
        return Neighborhood(window, stride, dilation, causal)
