"""Windows around every query: Box with three kinds of borders, FreeSwim's inward window, and windows of tiles."""

from dataclasses import dataclass

from gensparse.errors import ConfigError
from gensparse.layout import Grid, Layout
from gensparse.patterns.axes import SeparableRule, band, inward, ring, sliding_tiles, whole
from gensparse.patterns.base import NO_DATA, Data, Pattern, Rule
from gensparse.patterns.checks import PerAxis, PerAxisOrWhole, choice, per_axis, spread, windows

_BORDERS = {"clip": band, "shift": inward, "wrap": ring}


@dataclass(frozen=True, repr=False)
class Box(Pattern):
    """Keys at most `radius` tokens away on every axis: |dy|, |dx| (and |dt|) <= radius.

    Args:
        radius: one value for every axis, or one per axis, (H, W) or (F, H, W). It may exceed the grid.
        border: what happens at the borders. "clip": keys outside the grid do not exist, windows have fewer. "shift":
            the window of 2 * radius + 1 tokens moves inwards and keeps its size. "wrap": opposite borders touch.

    Raises:
        ConfigError: a radius that is not a positive integer, another border, or a tuple that leaves out an axis (when
            bound).
    """

    radius: PerAxis
    border: str = "clip"

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", per_axis("Box radius", self.radius))
        choice("Box border", self.border, tuple(_BORDERS))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        radius = spread("Box radius", self.radius, layout.grid)
        axis = _BORDERS[self.border]
        return SeparableRule(layout, [axis(*pair) for pair in zip(layout.grid, radius, strict=True)])

    def __repr__(self) -> str:
        border = "" if self.border == "clip" else f", border={self.border!r}"
        return f"Box(radius={self.radius!r}{border})"


@dataclass(frozen=True)
class InwardWindow(Pattern):
    """All frames, and in each a window of 2 * half + 1 rows and columns that moves inwards at the borders (FreeSwim, Wu
    et al. 2511.14712).

    The window keeps its size everywhere; an axis it would exceed is covered whole. FreeSwim takes half = (tokens of the
    native grid per axis) // 2: (15, 26) for 480 x 832 pixels.

    Args:
        half: rows and columns on each side, one value or (H, W), from 0.

    Raises:
        ConfigError: values that are not integers of at least 0, or more than two of them.
    """

    half: PerAxis

    def __post_init__(self) -> None:
        half = per_axis("InwardWindow half", self.half, low=0)
        if isinstance(half, tuple) and len(half) != 2:
            raise ConfigError(f"InwardWindow half={half!r} is not allowed; pass one integer or (H, W).")
        object.__setattr__(self, "half", half)

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        frames, height, width = layout.grid
        rows, columns = self.half if isinstance(self.half, tuple) else (self.half, self.half)
        return SeparableRule(layout, [whole(frames), inward(height, rows), inward(width, columns)])


@dataclass(frozen=True)
class SlidingTiles(Pattern):
    """Tiles that see the tiles around them (STA, Zhang et al. 2502.04507): windows move from tile to tile.

    All queries of a tile share `window` whole tiles per axis, centred on their own (an even window has one tile more
    before than after) and moved inwards at the borders. Where the tile divides an axis and the window is odd, this is
    `Neighborhood(window * tile, stride=tile)`; elsewhere the last tile is ragged. STA's own tile is (6, 8, 8).

    Args:
        tile: tokens per axis, one value or (H, W) or (F, H, W); None for the whole axis.
        window: tiles per axis, likewise; None for all of them.

    Raises:
        ConfigError: values that are not positive integers, or (when bound) a tile longer than its axis or a window of
            more tiles than the axis has.
    """

    tile: PerAxisOrWhole
    window: PerAxisOrWhole

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", per_axis("SlidingTiles tile", self.tile, whole=True))
        object.__setattr__(self, "window", per_axis("SlidingTiles window", self.window, whole=True, unit="tiles"))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        tile = windows("SlidingTiles tile", self.tile, layout.grid)
        window = windows("SlidingTiles window", self.window, _tiles(layout.grid, tile))
        return SeparableRule(layout, [sliding_tiles(*axis) for axis in zip(layout.grid, tile, window, strict=True)])

    def clamped(self, grid: Grid) -> "SlidingTiles":
        given = spread("SlidingTiles tile", self.tile, grid)
        tile = tuple(length if t is None else min(t, length) for t, length in zip(given, grid, strict=True))
        counts = _tiles(grid, tile)
        asked = spread("SlidingTiles window", self.window, counts)
        window = tuple(n if w is None else min(w, n) for w, n in zip(asked, counts, strict=True))
        return SlidingTiles(tile, window)


def _tiles(grid: Grid, tile: tuple[int, ...]) -> Grid:
    frames, rows, columns = (-(-length // t) for length, t in zip(grid, tile, strict=True))
    return frames, rows, columns
