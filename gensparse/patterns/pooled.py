"""Pooled: cells of the target averaged to extra keys that every target token sees (CLEAR, Liu et al. 2412.16112)."""

from dataclasses import dataclass

import numpy as np

from gensparse.errors import ConfigError
from gensparse.layout import Boxes, Coords, Grid, Layout, Segment
from gensparse.patterns.base import (
    FULL,
    NO_DATA,
    NONE,
    Bools,
    Columns,
    Data,
    Pattern,
    Relation,
    Rule,
    Source,
    Span,
    empty_span,
)
from gensparse.patterns.checks import PerAxis, choice, per_axis, spread, windows


@dataclass(frozen=True)
class Pooled(Pattern):
    """One extra key per cell of the target grid, seen by target queries only; text queries do not see it.

    Args:
        cells: tokens per cell and axis, one value (every axis longer than one token) or (H, W) or (F, H, W).
        weights: "learned": keys and values are sums with a weight per position in the cell, which the caller passes
            (CLEAR; the cells must divide the grid). "mean": plain averages, ragged cells at the end allowed.
        bias: "none", or "log_count": ln(tokens in the cell) added to the logits.
        name: name of the key source; by default made of cells, weights and bias.

    Raises:
        ConfigError: values of the wrong type or range, or (when bound) cells longer than an axis or, with learned
            weights, cells that do not divide it.
    """

    cells: PerAxis
    weights: str = "learned"
    bias: str = "none"
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", per_axis("Pooled cells", self.cells))
        choice("Pooled weights", self.weights, ("learned", "mean"))
        choice("Pooled bias", self.bias, ("none", "log_count"))
        if not isinstance(self.name, str):
            raise ConfigError(f"Pooled name={self.name!r} is not allowed; pass a string.")

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        cells = windows("Pooled cells", self.cells, layout.grid)
        if self.weights == "learned" and any(length % cell for cell, length in zip(cells, layout.grid, strict=True)):
            raise ConfigError(
                f"Pooled cells={self.cells!r} does not divide grid {layout.grid}, which learned weights need; choose "
                "cells that divide it, or weights='mean'."
            )
        frames, height, width = (-(-length // cell) for cell, length in zip(cells, layout.grid, strict=True))
        parts = ["pooled", "x".join(map(str, cells)), self.weights, *([] if self.bias == "none" else [self.bias])]
        bias = 0.0 if self.bias == "none" else self.bias
        name = self.name or "_".join(parts)
        segment = Segment("pooled", frames * height * width, (frames, height, width), name)
        return _PooledRule(layout, Source(segment, layout.target, cells, self.weights, bias))

    def clamped(self, grid: Grid) -> "Pooled":
        cells = tuple(map(min, spread("Pooled cells", self.cells, grid), grid))
        return Pooled(cells, self.weights, self.bias, self.name)


class _PooledRule(Rule):
    def __init__(self, layout: Layout, source: Source) -> None:
        super().__init__(layout, (source,))
        self._target, self._pool = layout.target, len(layout.segments)

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        return (q.segment == self._target) & (k.segment == self._pool)

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        filled = np.all(q.hi > q.lo, axis=-1) & np.all(k.hi > k.lo, axis=-1)
        return np.where(filled & (q.segment == self._target) & (k.segment == self._pool), FULL, NONE)

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns:
        return [self.tile_relation(q, k, group).astype(np.int64)]

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        lo, hi = empty_span(q)
        seen = np.all(q.hi > q.lo, axis=-1) & (q.segment == self._target) & (segment == self._pool)
        return lo, np.where(seen[..., None], self.key_segments[segment].shape, hi)
