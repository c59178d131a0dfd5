"""Tile shapes by counted cost: how many tile pairs the key boxes of a rule make a plan visit."""

from collections.abc import Iterator
from functools import cache
from math import prod

import numpy as np

from gensparse.layout import Boxes, Grid
from gensparse.patterns.base import RUNS, Rule
from gensparse.plan.tiles import SegmentTiles

SAMPLE = 512  # query tiles a shape is judged by


@cache
def shapes_of(size: int, fill: float = 0.9) -> tuple[Grid, ...]:
    """Shapes (F, H, W) of at most `size` tokens that use at least `fill` of the slots: powers of two, and 3 x 5 x 4."""
    powers = [1 << bits for bits in range(size.bit_length())]
    found = [(f, h, size // (f * h)) for f in powers for h in powers if f * h <= size and size % (f * h) == 0]
    odd = [(3, 5, 4), (3, 4, 5), (5, 4, 3), (4, 4, 3), (3, 4, 4), (3, 5, 8), (3, 10, 4), (6, 5, 4)]
    return (*found, *(shape for shape in odd if fill * size <= prod(shape) <= size))


def fitting(shapes: tuple[Grid, ...], grid: Grid) -> Iterator[Grid]:
    """Shapes without an axis that could be halved and still hold the whole axis of the grid, squarest first."""
    useful = [s for s in shapes if all(t == 1 or t < 2 * n for t, n in zip(s, grid, strict=True))]
    yield from sorted(useful or shapes, key=lambda shape: (max(shape), shape))


def tile_shapes(rule: Rule, q_size: int, k_size: int, step: Grid) -> tuple[Grid, Grid]:
    """Query and key tile shapes for the target that visit the fewest slots; the larger holds whole smaller ones."""
    natural = [rule.tiles(rule.layout.target, size) for size in (q_size, k_size)]
    if RUNS in natural and rule.layout.grid[:2] == (1, 1):
        return (1, 1, q_size), (1, 1, k_size)
    if isinstance(natural[0], tuple) and isinstance(natural[1], tuple):
        return natural[0], natural[1]
    grid = rule.layout.grid
    small, large = sorted((q_size, k_size))
    best = None
    for shape in fitting(shapes_of(small), grid):
        for grown in _grown(shape, large // small):
            queries, keys = (grown, shape) if q_size == large else (shape, grown)
            cost = _visited(rule, queries, keys, step)
            if best is None or cost < best[0]:
                best = (cost, queries, keys)
    assert best is not None
    return best[1], best[2]


def _grown(shape: Grid, times: int) -> list[Grid]:
    """The shape with one axis multiplied."""
    if times <= 1:
        return [shape]
    return [tuple(size * times if axis == n else size for axis, size in enumerate(shape)) for n in (1, 2, 0)]


def _visited(rule: Rule, q_shape: Grid, k_shape: Grid, step: Grid) -> float:
    """Slot pairs visited by target queries on target keys, all groups, estimated from a sample of query tiles."""
    target = rule.layout.target
    queries = SegmentTiles.cut(target, 0, rule.layout.grid, q_shape, step)
    sample = np.unique(np.linspace(0, len(queries) - 1, SAMPLE).astype(np.int64))
    all_boxes = queries.boxes
    boxes = Boxes(all_boxes.segment[sample], all_boxes.lo[sample], all_boxes.hi[sample], all_boxes.step)
    reach = np.array(k_shape) * np.array(step)
    tiles = 0.0
    for group in range(rule.groups):
        lo, hi = rule.key_box(boxes, target, group)
        spans = np.where(hi > lo, (hi - 1) // reach - lo // reach + 1, 0)
        tiles += float(np.prod(spans, axis=-1).mean())
    return tiles * len(queries) * prod(q_shape) * prod(k_shape) / _fill(k_shape) / _fill(q_shape)


def _fill(shape: Grid) -> float:
    """Share of the slots of a tile that hold tokens."""
    return prod(shape) / (1 << (prod(shape) - 1).bit_length())
