"""Block patterns: windows (plain, shifted, wrapped, both), halos, dilated grids, long distance, HiDiffusion's quarters.

Every axis may have any length: blocks at the end (and before a shift) are ragged instead of padded.
"""

from dataclasses import dataclass

from gensparse.layout import Grid as Shape
from gensparse.layout import Layout
from gensparse.patterns.axes import SeparableRule, blocks, halo, own, residues
from gensparse.patterns.base import NO_DATA, Data, Pattern, PerHead, Rule
from gensparse.patterns.checks import (
    PerAxis,
    PerAxisOrWhole,
    choice,
    not_above,
    per_axis,
    spread,
    whole_number,
    windows,
)


@dataclass(frozen=True)
class Blocks(Pattern):
    """Disjoint windows; tokens of one window see each other (Swin, Liu et al. 2103.14030).

    Args:
        window: tokens per axis, one value or (H, W) or (F, H, W); None for the whole axis.
        shift: where the second window starts, less than the window. Without wrap the first window is ragged: exactly
            Swin's shifted window with its mask.
        wrap: roll the grid instead, so that the last and the first rows share windows (Swin without its mask).

    Raises:
        ConfigError: values of the wrong type or range, or (when bound) a window longer than its axis.
    """

    window: PerAxisOrWhole
    shift: PerAxis = 0
    wrap: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", per_axis("Blocks window", self.window, whole=True))
        object.__setattr__(self, "shift", per_axis("Blocks shift", self.shift, low=0))
        choice("Blocks wrap", self.wrap, (False, True))
        not_above("Blocks shift", self.shift, "window", self.window, strict=True)

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        window = windows("Blocks window", self.window, layout.grid)
        shift = spread("Blocks shift", self.shift, layout.grid, single=0)
        not_above("Blocks shift", shift, "window", window, strict=True)
        axes = zip(layout.grid, window, shift, strict=True)
        return SeparableRule(layout, [blocks(*axis, self.wrap) for axis in axes])

    def clamped(self, grid: Shape) -> "Blocks":
        """Windows cut to the axis; an axis of one window is not shifted (as in Swin)."""
        given = spread("Blocks window", self.window, grid)
        window = tuple(length if w is None else min(w, length) for w, length in zip(given, grid, strict=True))
        shift = spread("Blocks shift", self.shift, grid, single=0)
        shift = tuple(0 if w == length else s for s, w, length in zip(shift, window, grid, strict=True))
        return Blocks(window, shift, self.wrap)


def double_windows(window: int, grid: Shape) -> PerHead:
    """Windows for one half of the heads and windows shifted by half of one for the other (StyleSwin, 2112.10762).

    Args:
        window: tokens per side; frames of a video stay apart.
        grid: (F, H, W) of the target. Where the shorter side is not longer than the window, the window is that side and
            nothing is shifted.

    Returns:
        A menu of two: entry 0 for the first half of the heads, entry 1 for the second.

    Raises:
        ConfigError: window is not a positive integer.
    """
    side = whole_number("double_windows window", window, unit="tokens")
    shortest = min(grid[1:])
    size, shift = (shortest, 0) if shortest <= side else (side, side // 2)
    return PerHead((Blocks((1, size, size)), Blocks((1, size, size), shift=(0, shift, shift))))


@dataclass(frozen=True)
class Halo(Pattern):
    """Blocks that also see `halo` tokens around themselves, clipped at the borders (HaloNet, 2103.12731).

    Args:
        block: tokens per axis, one value or (H, W) or (F, H, W); None for the whole axis.
        halo: tokens added on both sides, from 0.

    Raises:
        ConfigError: values of the wrong type or range, or (when bound) a block longer than its axis.
    """

    block: PerAxisOrWhole
    halo: PerAxis

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", per_axis("Halo block", self.block, whole=True))
        object.__setattr__(self, "halo", per_axis("Halo halo", self.halo, low=0))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        block = windows("Halo block", self.block, layout.grid)
        margin = spread("Halo halo", self.halo, layout.grid, single=0)
        return SeparableRule(layout, [halo(*axis) for axis in zip(layout.grid, block, margin, strict=True)])

    def clamped(self, grid: Shape) -> "Halo":
        given = spread("Halo block", self.block, grid)
        block = tuple(length if b is None else min(b, length) for b, length in zip(given, grid, strict=True))
        return Halo(block, spread("Halo halo", self.halo, grid, single=0))


@dataclass(frozen=True)
class Grid(Pattern):
    """`grid` tokens per axis, spread evenly over the whole axis (MaxViT's grid attention, Tu et al. 2204.01697).

    Tokens with the same remainder by ceil(length / grid) see each other; where grid does not divide the axis, some
    classes have fewer tokens.

    Raises:
        ConfigError: grid is not a positive integer, or (when bound) longer than an axis.
    """

    grid: PerAxis

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", per_axis("Grid grid", self.grid))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        count = windows("Grid grid", self.grid, layout.grid)
        axes = [residues(length, length, -(-length // g)) for length, g in zip(layout.grid, count, strict=True)]
        return SeparableRule(layout, axes)

    def clamped(self, grid: Shape) -> "Grid":
        return Grid(tuple(map(min, spread("Grid grid", self.grid, grid), grid)))


@dataclass(frozen=True)
class LongDistance(Pattern):
    """Every `interval`-th token inside regions of group * interval tokens (CrossFormer's LDA, Wang et al. 2108.00154).

    Args:
        group: tokens per class and axis, one value or (H, W) or (F, H, W).
        interval: distance between them. Regions beyond the end of an axis are ragged.

    Raises:
        ConfigError: values that are not positive integers, or (when bound) a group or interval longer than an axis.
    """

    group: PerAxis
    interval: PerAxis

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", per_axis("LongDistance group", self.group))
        object.__setattr__(self, "interval", per_axis("LongDistance interval", self.interval))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        group = windows("LongDistance group", self.group, layout.grid)
        interval = windows("LongDistance interval", self.interval, layout.grid)
        axes = zip(layout.grid, group, interval, strict=True)
        return SeparableRule(layout, [residues(length, g * i, i) for length, g, i in axes])

    def clamped(self, grid: Shape) -> "LongDistance":
        group = tuple(map(min, spread("LongDistance group", self.group, grid), grid))
        return LongDistance(group, tuple(map(min, spread("LongDistance interval", self.interval, grid), grid)))


@dataclass(frozen=True)
class MSW(Pattern):
    """HiDiffusion's modified shifted windows (Zhang et al. 2311.17528): 2 x 2 windows on a rolled grid.

    Windows have ceil(H/2) x ceil(W/2) tokens (odd axes: one window is a row or column smaller), the roll is
    index * (window // 4) per axis. As in the authors' code there is no roll at all while that is 0 for the rows.
    Frames of a video stay apart.

    Raises:
        ConfigError: index is not an integer from 0 to 3.
    """

    index: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", whole_number("MSW index", self.index, low=0, high=3))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        frames, height, width = layout.grid
        window = (-(-height // 2), -(-width // 2))
        shift = [self.index * (w // 4) for w in window]
        if shift[0] == 0:
            shift = [0, 0]
        axes = zip((height, width), window, shift, strict=True)
        return SeparableRule(layout, [own(frames), *(blocks(*axis, wrap=True) for axis in axes)])
