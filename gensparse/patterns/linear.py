"""The same rule on a layout whose segments are runs: tiles are then runs of tokens in raster order instead of boxes.

Masks that are defined on blocks of the raster order (Radial) are whole on such tiles and ragged on boxes. A pattern
combined with one of them follows it there.
"""

from dataclasses import replace
from itertools import product

import numpy as np

from gensparse.layout import Boxes, Coords, Grid, Ints, Layout
from gensparse.patterns.base import FULL, NONE, PARTIAL, Bools, Columns, Rehomed, Relation, Rule, Span, combined_of


def flat(layout: Layout) -> Layout:
    """The layout with every segment as one run of tokens."""
    return replace(layout, segments=tuple(replace(segment, grid=None) for segment in layout.segments))


def linear(rule: Rule) -> Rule:
    """The rule on the flat layout; sources keep their grids."""
    parts = combined_of(rule)
    if parts is not None:
        return type(rule)([linear(part) for part in parts])
    if isinstance(rule, Rehomed):
        return Rehomed(linear(rule.rule), rule.sources)
    return rule.linear() or _LinearRule(rule)


class _LinearRule(Rule):
    """Any rule, asked about runs of tokens: each run is cut into at most five boxes of its segment's grid."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(flat(rule.layout), rule.sources)
        self.rule, self.groups = rule, rule.groups
        self._shapes = np.array([segment.shape for segment in rule.key_segments], np.int64)
        self._own = len(rule.layout.segments)

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        return self.rule.allowed(self._grid_coords(q), self._grid_coords(k), group)

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        q_parts, k_parts = self._grid_boxes(q), self._grid_boxes(k)
        some, every = np.False_, np.True_
        for own, other in product(q_parts, k_parts):
            relation = self.rule.tile_relation(own, other, group)
            empty = np.any(own.hi <= own.lo, axis=-1) | np.any(other.hi <= other.lo, axis=-1)
            some = some | (relation != NONE)
            every = every & ((relation == FULL) | empty)
        return np.where(some, np.where(every, FULL, PARTIAL), NONE)

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        spans = [self.rule.key_box(part, segment, group) for part in self._grid_boxes(q)]
        far = max(self._shapes[segment])
        filled = [np.all(hi > lo, axis=-1, keepdims=True) for lo, hi in spans]
        lo = np.minimum.reduce([np.where(some, lo, far) for some, (lo, _) in zip(filled, spans, strict=True)])
        hi = np.maximum.reduce([np.where(some, hi, 0) for some, (_, hi) in zip(filled, spans, strict=True)])
        seen = np.logical_or.reduce(filled)
        lo = np.where(seen, lo, 0)
        if segment >= self._own:
            return lo, hi
        grid = tuple(self._shapes[segment])
        start, last = _index(lo, grid), _index(np.maximum(hi - 1, 0), grid)
        zero = np.zeros_like(start)
        stop = np.where(seen[..., 0], last + 1, 0)
        return np.stack([zero, zero, start], -1), np.stack([*(2 * [seen[..., 0].astype(np.int64)]), stop], -1)

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns:
        relation = self.tile_relation(q, k, group).astype(np.int64)
        return [np.where(relation == PARTIAL, np.arange(len(relation)) + len(relation), relation)]

    def partition(self, segment: int, group: int = 0) -> Ints | None:
        return self.rule.partition(segment, group)

    def _grid_coords(self, tokens: Coords) -> Coords:
        shape = self._shapes[tokens.segment]
        index = tokens.position[..., 2]
        plane, inside = np.divmod(index, shape[..., 1] * shape[..., 2])
        unraveled = np.stack([plane, *np.divmod(inside, shape[..., 2])], -1)
        own = np.asarray(tokens.segment < self._own)[..., None]
        return Coords(tokens.segment, np.where(own, unraveled, tokens.position))

    def _grid_boxes(self, box: Boxes) -> list[Boxes]:
        """Boxes of the grid that hold exactly the tokens of a run (of its hull, where it has steps)."""
        segment = np.asarray(box.segment)
        shape = self._shapes[segment]
        own = np.asarray(segment < self._own)
        filled = np.all(box.hi > box.lo, axis=-1)
        start, stop = box.lo[..., 2], np.minimum(box.hi[..., 2], shape.prod(axis=-1))
        stop = np.where(own & filled, stop, start)
        parts = _cut(start, stop, shape[..., 1], shape[..., 2])
        boxes = [Boxes(segment, lo, hi) for lo, hi in parts]
        if own.all():
            return boxes
        lo, hi = (np.where(own[..., None], 0, edge) for edge in (box.lo, box.hi))
        return [*boxes, Boxes(segment, lo, hi, box.step)]


def _cut(start: Ints, stop: Ints, rows: Ints, width: Ints) -> list[tuple[Ints, Ints]]:
    """lo and hi [..., 3] of the five boxes of runs: part of a row, rows, frames, rows, part of a row; 0 if empty."""
    first, last = -(-start // width), stop // width  # whole rows
    top, bottom = -(-first // rows), last // rows  # whole frames
    tail = np.where(last >= first, last * width, stop)
    below = np.where(bottom >= top, bottom * rows, last)
    frames = ((top, top * 0, top * 0), (bottom, rows, width))
    parts = [
        _row(start, np.minimum(stop, first * width), rows, width),
        _rows(first, np.minimum(last, top * rows), rows, width),
        frames,
        _rows(below, last, rows, width),
        _row(tail, stop, rows, width),
    ]
    edges = [tuple(np.stack(np.broadcast_arrays(*edge), -1) for edge in part) for part in parts]
    filled = [np.all(hi > lo, axis=-1, keepdims=True) for lo, hi in edges]
    return [(np.where(some, lo, 0), np.where(some, hi, 0)) for some, (lo, hi) in zip(filled, edges, strict=True)]


def _row(start: Ints, stop: Ints, rows: Ints, width: Ints) -> tuple[tuple[Ints, ...], tuple[Ints, ...]]:
    """Tokens start..stop-1 of one row."""
    row, column = np.divmod(start, width)
    frame, row = np.divmod(row, rows)
    return (frame, row, column), (frame + 1, row + 1, column + stop - start)


def _rows(start: Ints, stop: Ints, rows: Ints, width: Ints) -> tuple[tuple[Ints, ...], tuple[Ints, ...]]:
    """Rows start..stop-1 of one frame."""
    frame, row = np.divmod(start, rows)
    return (frame, row, row * 0), (frame + 1, row + stop - start, width)


def _index(position: Ints, grid: Grid) -> Ints:
    return (position[..., 0] * grid[1] + position[..., 1]) * grid[2] + position[..., 2]
