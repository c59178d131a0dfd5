"""Tiles: boxes of tokens of one segment, cut from its grid in raster order.

A tile may take every step-th token of an axis (dilated and grid patterns): then the tokens of one residue are cut, one
residue after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from gensparse.layout import Boxes, Grid, Ints, Segment


@dataclass(frozen=True)
class AxisTiles:
    """Tiles of one axis: first token and number of tokens [n] of each, and the distance between its tokens."""

    lo: Ints
    count: Ints
    step: int

    @classmethod
    def cut(cls, length: int, tile: int, step: int) -> "AxisTiles":
        step = min(step, length)
        sizes = [-(-(length - residue) // step) for residue in range(step)]
        lo = [residue + step * np.arange(0, size, tile) for residue, size in enumerate(sizes)]
        count = [np.minimum(tile, size - np.arange(0, size, tile)) for size in sizes]
        return cls(np.concatenate(lo), np.concatenate(count), step)

    @property
    def hi(self) -> Ints:
        """Last token + 1."""
        return self.lo + self.step * (self.count - 1) + 1


@dataclass(frozen=True)
class SegmentTiles:
    """Tiles of one segment in raster order of tiles.

    Args:
        number: index of the segment.
        start: its first token.
        grid: its (F, H, W).
        shape: tokens of a whole tile per axis; tiles at the end of an axis may hold fewer.
        axes: the tiles of each axis.
    """

    number: int
    start: int
    grid: Grid
    shape: Grid
    axes: tuple[AxisTiles, AxisTiles, AxisTiles]

    @classmethod
    def cut(cls, number: int, start: int, grid: Grid, shape: Grid, step: Grid = (1, 1, 1)) -> "SegmentTiles":
        axes = tuple(AxisTiles.cut(*axis) for axis in zip(grid, shape, step, strict=True))
        return cls(number, start, grid, shape, axes)

    def __len__(self) -> int:
        return prod(len(axis.lo) for axis in self.axes)

    @cached_property
    def boxes(self) -> Boxes:
        """Every tile as a box: segment [n], lo and hi [n, 3], step [3]."""
        step = np.array([axis.step for axis in self.axes])
        return Boxes(np.full(len(self), self.number), self._each("lo"), self._each("hi"), step)

    @cached_property
    def count(self) -> Ints:
        """Tokens per axis [n, 3] of every tile."""
        return self._each("count")

    def coords(self, tiles: Ints, size: int) -> tuple[Ints, np.ndarray]:
        """Position [n, size, 3] of every slot of some tiles, and whether it holds a token [n, size]."""
        return slot_coords(self.boxes.lo[tiles], self.count[tiles], self.boxes.step, self.shape, size)

    def rows(self, size: int) -> Ints:
        """Token index of every slot [n, size], -1 where the slot is empty."""
        position, valid = self.coords(np.arange(len(self)), size)
        return np.where(valid, self.start + raster(position, self.grid), -1)

    def _each(self, name: str) -> Ints:
        axes = np.meshgrid(*(getattr(axis, name) for axis in self.axes), indexing="ij")
        return np.stack([axis.reshape(-1) for axis in axes], -1)


def slot_coords(lo: Ints, count: Ints, step: Ints, shape: Grid, size: int) -> tuple[Ints, np.ndarray]:
    """Positions [n, size, 3] of the slots of boxes with `count` [n, 3] tokens, slots in raster order of `shape`."""
    offset = np.indices(shape).reshape(3, -1).T
    offset = np.concatenate([offset, np.zeros((size - len(offset), 3), np.int64)])
    valid = np.all(offset < count[:, None], axis=-1) & (np.arange(size) < prod(shape))
    return np.where(valid[..., None], lo[:, None] + step * offset, 0), valid


def raster(position: Ints, grid: Grid) -> Ints:
    """Index of positions [..., 3] in raster order."""
    return (position[..., 0] * grid[1] + position[..., 1]) * grid[2] + position[..., 2]


def cut_segments(
    segments: Sequence[Segment], shape: Grid, size: int, step: Grid = (1, 1, 1), stepped: int = -1
) -> tuple[SegmentTiles, ...]:
    """Tiles of consecutive segments: `shape` on grids, runs of `size` tokens on segments without one."""
    starts = np.cumsum([0, *(segment.length for segment in segments)]).tolist()
    return tuple(
        SegmentTiles.cut(
            number,
            start,
            segment.shape,
            (1, 1, size) if segment.grid is None else shape,
            step if number == stepped else (1, 1, 1),
        )
        for number, (segment, start) in enumerate(zip(segments, starts, strict=False))
    )
