"""Patterns along rows and columns: stripes, criss-cross and planes."""

from dataclasses import dataclass

from gensparse.layout import Grid, Layout
from gensparse.patterns.axes import Axis, SeparableRule, blocks, own, whole
from gensparse.patterns.base import NO_DATA, Data, Pattern, Rule, UnionRule
from gensparse.patterns.checks import choice, fits, whole_number


@dataclass(frozen=True)
class Stripes(Pattern):
    """Bands across the whole picture (CSWin, Dong et al. 2107.00652); frames of a video stay apart.

    Args:
        width: rows (horizontal) or columns (vertical) per stripe; the last stripe may be narrower.
        direction: "horizontal" or "vertical". CSWin gives each to half of the heads:
            PerHead((Stripes(7, "vertical"), Stripes(7, "horizontal"))).

    Raises:
        ConfigError: another direction, a width that is not a positive integer or (when bound) longer than its axis.
    """

    width: int
    direction: str = "horizontal"

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", whole_number("Stripes width", self.width, unit="tokens"))
        choice("Stripes direction", self.direction, ("horizontal", "vertical"))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        frames, height, width = layout.grid
        if self.direction == "horizontal":
            fits("Stripes width", self.width, "H", layout.grid)
            return SeparableRule(layout, [own(frames), blocks(height, self.width), whole(width)])
        fits("Stripes width", self.width, "W", layout.grid)
        return SeparableRule(layout, [own(frames), whole(height), blocks(width, self.width)])

    def clamped(self, grid: Grid) -> "Stripes":
        return Stripes(min(self.width, grid[1] if self.direction == "horizontal" else grid[2]), self.direction)


@dataclass(frozen=True)
class CrissCross(Pattern):
    """The query's row and column, and in a video its line through time (CCNet, Huang et al. 1811.11721).

    One softmax over the union: H + W - 1 keys in a picture, the query itself counted once.
    """

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        lines = [axis for axis, length in enumerate(layout.grid) if length > 1] or [2]
        return UnionRule([SeparableRule(layout, _line(layout.grid, axis)) for axis in lines])


@dataclass(frozen=True)
class Planes(Pattern):
    """The three planes through the query: its frame, its row in all frames, and its column in all frames.

    One softmax over the union: HW + FW + FH - F - H - W + 1 keys. Where the grid has fewer than three axes of more than
    one token it is CrissCross, whose lines are what is left of the planes.
    """

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        if min(layout.grid) == 1:
            return CrissCross().bind(layout, data)
        return UnionRule([SeparableRule(layout, _plane(layout.grid, axis)) for axis in range(3)])


def _plane(grid: Grid, across: int) -> list[Axis]:
    return [own(length) if axis == across else whole(length) for axis, length in enumerate(grid)]


def _line(grid: Grid, along: int) -> list[Axis]:
    return [whole(length) if axis == along else own(length) for axis, length in enumerate(grid)]
